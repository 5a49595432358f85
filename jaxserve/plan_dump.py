"""A plan log as lines of JSON, one per record, with what plans pack unpacked."""

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from jaxserve.plan_log import PlanLog, PlannedStep, Record
from jaxserve.step_plan import (
    EXTRAS_PARTS,
    NO_TOKEN,
    NUM_EXTRAS,
    PATCH_HEADER,
    SAMPLING_START,
    ints,
)

Fields = dict[str, Any]


def dump(log: PlanLog) -> Iterator[str]:
    """Raises ValueError where the log is damaged."""
    yield _line(msgspec.to_builtins(log.header))
    max_rows, pages = log.header.shape["max_rows"], log.header.shape["pages_per_row"]
    for record in log:
        yield _line(_describe(record, max_rows, PATCH_HEADER + pages))


def _line(fields: Fields) -> str:
    return msgspec.json.encode(fields).decode()


def _describe(record: Record, max_rows: int, patch_width: int) -> Fields:
    if not isinstance(record, PlannedStep):
        return msgspec.to_builtins(record)
    plan = record.plan
    described = {
        "forward": lambda packed: _forward(packed, plan.num_rows, max_rows),
        "patch": lambda packed: _patch(packed, max_rows, patch_width),
        "extras": _extras,
        "counts": _counts,
        "copies": _copies,
        "scores": _scores,
    }
    fields: Fields = {"type": "plan"}
    for name, value in msgspec.structs.asdict(plan).items():
        if not isinstance(value, bytes):
            fields[name] = value
        elif value:
            fields[name] = described.get(name, np.ndarray.tolist)(ints(value))
    return fields


def _forward(packed: np.ndarray, num_rows: int, max_rows: int) -> list[Fields]:
    """By row. Token -1 is the row's last sampled one."""
    header, tokens = np.split(packed, [3 * num_rows])
    rows, lengths, samples = header.reshape(3, -1)
    pieces = np.split(tokens, np.cumsum(lengths))
    return [
        {"row": row, "samples": bool(one_samples), "tokens": piece.tolist()}
        for row, one_samples, piece in zip(rows.tolist(), samples, pieces, strict=False)
        if row < max_rows
    ]


def _patch(packed: np.ndarray, max_rows: int, width: int) -> Fields:
    """The rows that change, and those that decode from now on."""
    lines, batch = np.split(packed, [-max_rows])
    changes = [_row(line) for line in lines.reshape(-1, width) if line[0] < max_rows]
    return {"rows": changes, "batch": batch[batch < max_rows].tolist()}


def _row(line: np.ndarray) -> Fields:
    """-1 is "as it was"; pages are without the zeros that follow."""
    names = ("row", "seq_len", "last_token", "finish", "limit")
    stop_ids, pages = line[len(names) : SAMPLING_START], line[PATCH_HEADER:]
    return dict(zip(names, line.tolist(), strict=False)) | {
        "stop_ids": stop_ids[stop_ids >= 0].tolist(),
        "sampling": _sampling(line[SAMPLING_START:PATCH_HEADER]),
        "pages": np.trim_zeros(pages, "b").tolist(),
    }


def _sampling(packed: np.ndarray) -> Fields:
    """As `step_plan.pack_sampling` packs it."""
    penalties = ("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    return {
        **dict(zip(("temperature", "top_p"), _floats(packed[:2]), strict=True)),
        "top_k": int(packed[2]),
        "seed": int(packed[3:5].view(np.int64)[0]),
        **dict(zip(penalties, _floats(packed[5:9]), strict=True)),
        "min_len": int(packed[9]),
        "has_extras": bool(packed[10]),
    }


def _extras(packed: np.ndarray) -> list[Fields]:
    """As `step_plan.pack_extras` packs it."""
    described = []
    for row, *rest in packed.reshape(-1, 1 + NUM_EXTRAS):
        ids, biases, *others = np.split(np.array(rest), np.cumsum(EXTRAS_PARTS)[:-1])
        banned, probes = (part[part != NO_TOKEN].tolist() for part in others)
        is_used = ids != NO_TOKEN
        bias = zip(map(str, ids[is_used]), _floats(biases[is_used]), strict=True)
        described.append(
            {"row": int(row), "logit_bias": dict(bias), "banned": banned, "probes": probes}
        )
    return described


def _counts(packed: np.ndarray) -> list[Fields]:
    described, rest = [], packed.tolist()
    while rest:
        row, length = rest[:2]
        described.append({"row": row, "tokens": rest[2 : 2 + length]})
        rest = rest[2 + length :]
    return described


def _copies(packed: np.ndarray) -> list[Fields]:
    names = ("source", "target", "tokens")
    triples = packed.reshape(-1, 3).tolist()
    return [dict(zip(names, triple, strict=True)) for triple in triples if triple[2]]


def _scores(packed: np.ndarray) -> list[Fields]:
    names = ("index", "next_token", "row")
    return [dict(zip(names, triple, strict=True)) for triple in packed.reshape(-1, 3).tolist()]


def _floats(bits: np.ndarray) -> list[float]:
    """With the digits that a float32 has, no more."""
    return [float(str(value)) for value in bits.view(np.float32)]

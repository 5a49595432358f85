"""A plan log as lines of JSON, one per record."""

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from jaxserve.plan_log import Dispatched, PlanLog, Record
from jaxserve.step_plan import PATCH_HEADER, SAMPLING_START, StepPlan, ints


def dump(log: PlanLog) -> Iterator[str]:
    """Raises ValueError where the log is damaged."""
    yield _line(msgspec.to_builtins(log.header))
    max_rows, pages = log.header.shape["max_rows"], log.header.shape["pages_per_row"]
    for record in log:
        yield _line(_describe(record, max_rows, PATCH_HEADER + pages))


def _line(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


def _describe(record: Record, max_rows: int, patch_width: int) -> dict[str, Any]:
    if not isinstance(record, Dispatched):
        return msgspec.to_builtins(record)
    plan = record.plan
    fields = msgspec.structs.asdict(plan)
    packed = {k: ints(v).tolist() for k, v in fields.items() if isinstance(v, bytes) and v}
    plain = {k: v for k, v in fields.items() if not isinstance(v, bytes)}
    if plan.forward:
        packed["forward"] = _describe_forward(plan, max_rows)
    if plan.patch:
        packed["patch"] = _describe_patch(plan, max_rows, patch_width)
    if plan.copies:
        packed["copies"] = [
            {"source": source, "target": target, "tokens": kept}
            for source, target, kept in ints(plan.copies).reshape(-1, 3).tolist()
            if kept
        ]
    return {"type": "plan"} | plain | packed


def _describe_forward(plan: StepPlan, max_rows: int) -> list[dict[str, Any]]:
    """By row. Token -1 is the row's last sampled one."""
    header, tokens = np.split(ints(plan.forward), [3 * plan.num_rows])
    rows, lengths, samples = header.reshape(3, -1)
    pieces = np.split(tokens, np.cumsum(lengths))
    return [
        {"row": row, "samples": bool(one_samples), "tokens": piece.tolist()}
        for row, one_samples, piece in zip(rows.tolist(), samples, pieces, strict=False)
        if row < max_rows
    ]


def _describe_patch(plan: StepPlan, max_rows: int, width: int) -> dict[str, Any]:
    """The rows that change, and those that decode from now on. -1: as it was; pages without the
    zeros that follow."""
    lines, batch = np.split(ints(plan.patch), [-max_rows])
    changes = [_describe_line(line) for line in lines.reshape(-1, width) if line[0] < max_rows]
    return {"rows": changes, "batch": batch[batch < max_rows].tolist()}


def _describe_line(line: np.ndarray) -> dict[str, Any]:
    names = ("row", "seq_len", "last_token", "finish", "limit")
    stop_ids, pages = line[len(names) : SAMPLING_START], line[PATCH_HEADER:]
    return dict(zip(names, line.tolist(), strict=False)) | {
        "stop_ids": stop_ids[stop_ids >= 0].tolist(),
        "sampling": line[SAMPLING_START:PATCH_HEADER].tolist(),
        "pages": np.trim_zeros(pages, "b").tolist(),
    }

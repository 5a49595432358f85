"""The files that recorded expert distributions go to.

Where SGLang writes torch pickles, these are safetensors: the same names and shapes, and nothing
that runs when they are read.
"""

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int16, Int32, Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxserve.errors import RequestError
from jaxserve.expert_load import utilization
from jaxserve.messages import ExpertInfo

logger = logging.getLogger(__name__)
NUM_EXPERTS = "num_experts"  # in the metadata
HEADER = "layer_id,expert_id,count"
MOST_NUMBER = 4096  # of layers and of experts in a CSV: what a table in memory can be


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """What one run of the model did, padding left out."""

    number: int
    is_decode: bool
    tokens: Int32[np.ndarray, " T"]  # -1 where what was computed is nobody's any more
    positions: Int32[np.ndarray, " T"]
    expert_ids: Int16[np.ndarray, "T L k"]  # in layers that have experts


def write_counts(counts: Int64[np.ndarray, "layers E"]) -> pathlib.Path:
    """A CSV in the working directory, without the experts that nobody took; but where there is a
    count at all the last expert of the last layer is there, so that a reader knows how many."""
    taken = counts > 0
    if counts.any():
        taken[-1, -1] = True
    lines = [f"{layer},{expert},{counts[layer, expert]}" for layer, expert in np.argwhere(taken)]
    name = f"expert_distribution_rank0_timestamp{time.time()}.csv"
    return _write(pathlib.Path.cwd(), name, "\n".join([HEADER, *lines, ""]).encode(), mode=0o644)


def write_statistics(
    folder: pathlib.Path, counts: Int[np.ndarray, "passes layers E"]
) -> pathlib.Path:
    """Mode stat: `logical_count`; the metadata has the mean utilization."""
    rate = str(utilization(counts))
    return _write_tensors(
        folder,
        {"logical_count": counts.astype(np.int32)},
        {"rank": "0", "average_utilization_rate_over_window": rate},
        rank_suffix="",
    )


def write_passes(
    folder: pathlib.Path, numbers: Sequence[int], counts: Int[np.ndarray, "passes layers E"]
) -> pathlib.Path:
    """Mode per_pass: `forward_pass_id` and `global_physical_count`."""
    tensors = {
        "forward_pass_id": np.array(numbers, np.int64),
        "global_physical_count": counts.astype(np.int32),
    }
    return _write_tensors(folder, tensors, {"rank": "0", "gatherer_key": "primary"})


def write_tokens(
    folder: pathlib.Path, passes: Sequence[ForwardPass], info: ExpertInfo
) -> pathlib.Path:
    """Mode per_token: the tokens of all passes one after the other, `num_tokens` of each pass.
    `topk_ids_of_layer` is [layers, tokens, top_k], -1 in layers without experts."""
    sizes = np.array([len(one.tokens) for one in passes], np.int64)
    chosen = np.full((info.num_layers, int(sizes.sum()), info.top_k), -1, np.int16)
    if passes:
        together = np.concatenate([one.expert_ids for one in passes])
        chosen[info.sparse_layers] = together.swapaxes(0, 1)
    nothing = [np.zeros(0, np.int32)]
    tensors = {
        "forward_pass_id": np.array([one.number for one in passes], np.int64),
        "is_decode": np.array([one.is_decode for one in passes], np.uint8),
        "num_tokens": sizes,
        "input_ids": np.concatenate(nothing + [one.tokens for one in passes]),
        "positions": np.concatenate(nothing + [one.positions for one in passes]),
        "topk_ids_of_layer": chosen,
    }
    metadata = {"rank": "0", "gatherer_key": "primary", NUM_EXPERTS: str(info.num_experts)}
    return _write_tensors(folder, tensors, metadata)


def read_counts(path: pathlib.Path) -> Int64[np.ndarray, "layers E"]:
    """All counts of a file of any kind, together.

    Raises:
      ValueError: it is none of them.
      OSError: it cannot be read.
    """
    if path.suffix == ".csv":
        return _read_csv(path)
    try:
        with safe_open(path, "numpy") as file:
            metadata, tensors = (
                file.metadata() or {},
                {key: file.get_tensor(key) for key in sorted(file.keys())},
            )
    except SafetensorError as error:
        raise ValueError(f"{path} is neither a CSV nor safetensors: {error}") from error
    for name in ("logical_count", "global_physical_count"):
        if name in tensors and tensors[name].ndim == 3:
            return tensors[name].sum(axis=0, dtype=np.int64)
    chosen = tensors.get("topk_ids_of_layer")
    if chosen is None or chosen.ndim != 3:
        raise ValueError(f"{path} has no record of experts, only {sorted(tensors)}")
    num_experts = int(metadata.get(NUM_EXPERTS, chosen.max(initial=0) + 1))
    rows = [np.bincount(layer[layer >= 0], minlength=num_experts) for layer in chosen]
    return np.stack(rows).astype(np.int64)


def _read_csv(path: pathlib.Path) -> Int64[np.ndarray, "layers E"]:
    header, *lines = path.read_text().splitlines() or [""]
    if header != HEADER:
        raise ValueError(f"{path} does not begin with {HEADER}")
    try:
        rows = np.array([[int(part) for part in line.split(",")] for line in lines], np.int64)
        rows = rows.reshape(len(lines), 3)
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not three integers") from error
    layers, experts, counts = rows.T
    if rows.min(initial=0) < 0 or rows[:, :2].max(initial=0) >= MOST_NUMBER:
        raise ValueError(f"{path} has a layer or an expert beyond 0 to {MOST_NUMBER - 1}")
    table = np.zeros((layers.max(initial=-1) + 1, experts.max(initial=-1) + 1), np.int64)
    np.add.at(table, (layers, experts), counts)
    return table


def _write_tensors(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str],
    rank_suffix: str = "_0",
) -> pathlib.Path:
    """For nobody else to read: with every token there are whole prompts and answers."""
    name = f"expert_distribution_recorder_{time.time()}{rank_suffix}.safetensors"
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return _write(folder, name, save(tensors, metadata), mode=0o600)


def _write(folder: pathlib.Path, name: str, content: bytes, mode: int) -> pathlib.Path:
    """At once or not at all, since readers look for the name.

    Raises RequestError where it cannot be written; the record is lost.
    """
    path, partial = folder / name, folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        partial.replace(path)
    except OSError as error:
        words = f"the record of experts is lost: {path} cannot be written: {error.strerror}"
        logger.error("%s", words)
        raise RequestError(words, status=500) from error
    logger.info("Write expert distribution to %s", path)
    return path

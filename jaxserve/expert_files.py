"""The files that recorded expert distributions go to.

Where SGLang writes torch pickles, these are safetensors: the same names and shapes, and nothing
that runs when they are read.
"""

import os
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Int64
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jaxserve.messages import ExpertInfo

if TYPE_CHECKING:
    from jaxserve.expert_recorder import ForwardPass

FOLDER = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"  # environment: of all but the CSV
HEADER = "layer_id,expert_id,count"
MOST_NUMBER = 4096  # of layers and of experts in a CSV: what a table in memory can be


def write_counts(counts: Int64[np.ndarray, "layers E"]) -> pathlib.Path:
    """A CSV in the working directory, without the experts that nobody took."""
    lines = [f"{layer},{expert},{counts[layer, expert]}" for layer, expert in np.argwhere(counts)]
    path = pathlib.Path.cwd() / f"expert_distribution_rank0_timestamp{time.time()}.csv"
    return _write(path, "\n".join([HEADER, *lines, ""]).encode())


def write_statistics(counts: Int[np.ndarray, "passes layers E"]) -> pathlib.Path:
    """Mode stat: `logical_count`; the metadata has the mean utilization."""
    rate = str(utilization(counts))
    return _write_tensors(
        {"logical_count": counts.astype(np.int32)},
        {"rank": "0", "average_utilization_rate_over_window": rate},
        rank_suffix="",
    )


def write_passes(
    numbers: Sequence[int], counts: Int[np.ndarray, "passes layers E"]
) -> pathlib.Path:
    """Mode per_pass: `forward_pass_id` and `global_physical_count`."""
    tensors = {
        "forward_pass_id": np.array(numbers, np.int64),
        "global_physical_count": counts.astype(np.int32),
    }
    return _write_tensors(tensors, {"rank": "0", "gatherer_key": "primary"})


def write_tokens(passes: Sequence["ForwardPass"], info: ExpertInfo) -> pathlib.Path:
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
    return _write_tensors(tensors, {"rank": "0", "gatherer_key": "primary"})


def read_counts(path: pathlib.Path) -> Int64[np.ndarray, "layers E"]:
    """All counts of a file of any kind, together.

    Raises:
      ValueError: it is none of them.
      OSError: it cannot be read.
    """
    if path.suffix == ".csv":
        return _read_csv(path)
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is neither a CSV nor safetensors: {error}") from error
    for name in ("logical_count", "global_physical_count"):
        if name in tensors and tensors[name].ndim == 3:
            return tensors[name].sum(axis=0, dtype=np.int64)
    chosen = tensors.get("topk_ids_of_layer")
    if chosen is None or chosen.ndim != 3:
        raise ValueError(f"{path} has no record of experts, only {sorted(tensors)}")
    num_experts = int(chosen.max(initial=0)) + 1
    rows = [np.bincount(layer[layer >= 0], minlength=num_experts) for layer in chosen]
    return np.stack(rows).astype(np.int64)


def _read_csv(path: pathlib.Path) -> Int64[np.ndarray, "layers E"]:
    header, *lines = path.read_text().splitlines() or [""]
    if header != HEADER:
        raise ValueError(f"{path} does not begin with {HEADER}")
    try:
        rows = np.array([line.split(",") for line in lines], np.int64).reshape(-1, 3)
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not three integers") from error
    layers, experts, counts = rows.T
    if rows.min(initial=0) < 0 or rows[:, :2].max(initial=0) >= MOST_NUMBER:
        raise ValueError(f"{path} has a layer or an expert beyond 0 to {MOST_NUMBER - 1}")
    table = np.zeros((layers.max(initial=-1) + 1, experts.max(initial=-1) + 1), np.int64)
    np.add.at(table, (layers, experts), counts)
    return table


def utilization(counts: Int[np.ndarray, "passes layers E"]) -> float:
    """The mean expert's load over the busiest one's, over all passes and layers with experts."""
    busiest = counts.max(axis=-1, initial=0)
    used = busiest > 0
    return float((counts.mean(axis=-1)[used] / busiest[used]).mean()) if used.any() else 0.0


def _write_tensors(
    tensors: dict[str, np.ndarray], metadata: dict[str, str], rank_suffix: str = "_0"
) -> pathlib.Path:
    folder = pathlib.Path(os.environ.get(FOLDER, "/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"expert_distribution_recorder_{time.time()}{rank_suffix}.safetensors"
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return _write(path, save(tensors, metadata))


def _write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """At once or not at all: a reader looks for the name."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path

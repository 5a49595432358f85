"""The weights that serve, read by their names in the checkpoint, from any thread."""

import gc
import hashlib

import jax
import msgspec
import numpy as np
from flax import nnx

from jaxserve.errors import RequestError
from jaxserve.models.weights import View, views
from jaxserve.runner import Runner

MOST_VALUES = 1 << 22  # in an answer: 100 rows of 40,000, about 80 MB of JSON


class ServedWeights:
    def __init__(self, abstract: nnx.State, runner: Runner):
        """Args:
        abstract: the model's parameters, from `create_model`.
        """
        self.abstract, self._runner = abstract, runner
        self._views = {view.name: view for view in views(abstract)}
        self._numbers = {tuple(path): i for i, (path, _) in enumerate(nnx.to_flat_state(abstract))}

    def read_tensor(self, name: str, most_rows: int) -> bytes:
        """The first rows of a checkpoint tensor, as JSON: nested lists of floats. Written row by
        row, so that other threads get on.

        Raises RequestError where the model has no such tensor, or the rows are too many values.
        """
        view = self._views.get(name)
        if view is None:
            raise RequestError(f"the model has no parameter {name!r}", param="name")
        num_rows, row_size = min(most_rows, view.shape[0]), int(np.prod(view.shape[1:]))
        if num_rows * row_size > MOST_VALUES:
            raise RequestError(
                f"truncate_size may be {MOST_VALUES // row_size} at most for {name}, whose rows "
                f"have {row_size} values",
                param="truncate_size",
            )
        rows = _cut(self._copy(view), view)[:num_rows]
        if len(view.shape) == 1:
            return msgspec.json.encode(rows.astype(np.float32).tolist())
        texts = (msgspec.json.encode(row.astype(np.float32).tolist()) for row in rows)
        return b"[" + b",".join(texts) + b"]"

    def checksum(self) -> str:
        """SHA-256 of all tensors: of each, by name, the line "NAME DTYPE SHAPE", as
        `model.norm.weight bfloat16 (160,)`, and its bytes.

        By name those of a layer follow one another: of one layer's parameters, or little more,
        there are copies at a time.
        """
        sha256, copies = hashlib.sha256(), {}
        ordered = sorted(self._views.items())
        last = {view.path: name for name, view in ordered}
        for name, view in ordered:
            if view.path not in copies:
                copies[view.path] = self._copy(view)
            tensor = _cut(copies[view.path], view)
            sha256.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            sha256.update(tensor.view(np.uint8))
            if last[view.path] == name:
                del copies[view.path]
        return sha256.hexdigest()

    def _copy(self, view: View) -> np.ndarray:
        """Of the whole parameter, which is cut on the host: no program is compiled for it."""
        leaf = self._runner.weights[self._numbers[view.path]]
        if leaf is None:
            raise RequestError("the weights are not complete")
        return copy_to_host(leaf)


def copy_to_host(leaf: jax.Array) -> np.ndarray:
    """Its numbers, in memory that is free again when the caller drops them.

    `np.asarray(leaf)` would leave them on the array for as long as it lives. So another array of
    the same buffers is asked; what that holds jax lets go when Python looks for garbage.
    """
    shards = [shard.data for shard in leaf.addressable_shards]
    array = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    copy = np.asarray(array)
    del array
    gc.collect(0)
    return copy


def _cut(parameter: np.ndarray, view: View) -> np.ndarray:
    return np.ascontiguousarray(parameter[view.index]).reshape(view.shape)

"""The arrays of an orbax checkpoint under the names of its tree, read by TensorStore.

Nothing but the tree's names comes from orbax itself, whose import takes a second: the arrays are
zarr, in a key-value store (OCDBT) or in files of their own. A box is read as it is asked for,
from the chunks that meet it.
"""

import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.models.orbax_folder import TREE_FILE, OrbaxFolder
from jaxserve.models.safetensors_file import Tensor

CACHE_BYTES = 256 << 20  # of decoded chunks: the tensors of a fused leaf share them
ERRORS = (ValueError, IndexError, KeyError, NotImplementedError, MemoryError)  # of TensorStore
ARRAYS = ("jax.Array", "np.ndarray", "scalar")


class OrbaxArrays:
    """As `SafetensorsFile`, of a whole folder."""

    def __init__(self, folder: OrbaxFolder):
        """Takes the folder over. Raises ValueError, which names what is not sound."""
        self.path, self._folder = folder.path, folder
        try:
            self._arrays = self._open(_stored_names(folder.tree.get("tree_metadata")))
            self.tensors = {name: _tensor(name, array) for name, array in self._arrays.items()}
        except BaseException as error:
            folder.close()
            if isinstance(error, ValueError):
                raise ValueError(f"{folder.path}: {error}") from error
            raise

    def read_box(
        self, name: str, shape: Sequence[int], box: Sequence[tuple[int, int]], out: np.ndarray
    ) -> None:
        """As `SafetensorsFile.read_box`; the columns of a matrix are read only as far as they are
        asked for."""
        array = self._arrays[name]
        if array.ndim == 0:
            array = array[np.newaxis]
        split = len(shape) - array.ndim + 1  # the axes before it are one in the store, the rows
        lead = next((axis for axis in range(split) if shape[axis] > 1), split - 1)
        inner = shape[lead + 1 : split]
        rows = slice(*(edge * math.prod(inner) for edge in box[lead]))
        try:
            part = array[(rows, *(slice(*cut) for cut in box[split:]))].read().result()
        except ERRORS as error:
            raise ValueError(f"{self.path}: {name}: {self._say(error)}") from error
        part = part.reshape(-1, *inner, *out.shape[split:])
        part = part[(slice(None), *(slice(*cut) for cut in box[lead + 1 : split]))]
        out[...] = part.astype(out.dtype, copy=False).reshape(out.shape)

    def descriptors(self) -> dict[pathlib.Path, int]:
        return self._folder.descriptors

    def check_unchanged(self) -> None:
        self._folder.check_unchanged()

    def close(self) -> None:
        self._arrays = {}
        self._folder.close()

    def _open(self, stored: dict[str, str]) -> dict[str, Any]:
        """All at once: each is a read of its own, of what may be another machine's disk."""
        import tensorstore  # for those who have such a checkpoint

        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        opening = {}
        try:
            for name, key in stored.items():
                spec = self._spec(key)
                opening[name] = tensorstore.open(spec, open=True, read=True, context=context)
            arrays = {}
            for name, future in opening.items():
                arrays[name] = future.result()
        except ERRORS as error:
            raise ValueError(f"{name}: {self._say(error)}") from error
        return arrays

    def _spec(self, key: str) -> dict[str, Any]:
        tree, files = self._folder.tree, {"driver": "file", "path": f"{self._folder.view}/"}
        if self._folder.is_ocdbt:
            store = {"driver": "ocdbt", "base": files, "path": f"{key}/"}
        else:
            store = files | {"path": f"{self._folder.view}/{key}/"}
        return {
            "driver": "zarr3" if tree.get("use_zarr3") else "zarr",
            "kvstore": store,
            # Whoever saves otherwise leaves out chunks of zeros, as those are that got lost.
            "fill_missing_data_reads": not tree.get("store_array_data_equal_to_fill_value"),
        }

    def _say(self, error: BaseException) -> str:
        """Without TensorStore's own source lines, and the folder that is only a view."""
        words = re.split(r" \[[a-z_ ]+=", str(error))[0] or type(error).__name__
        words = words.replace(f' in OCDBT database at local file "{self._folder.view}/"', "")
        return words.replace(f"{self._folder.view}/", "")


def _stored_names(entries: Any) -> dict[str, str]:
    """The store's name of each array by its name for us.

    An `nnx.State` has a `value` below each name; of a trainer's state `params` is the model.
    """
    paths = [_path(entry) for entry in _arrays_of(entries)]
    is_state = bool(paths) and all(path[-1] == "value" and len(path) > 1 for path in paths)
    is_trainers = any(path[0] == "params" and len(path) > 1 for path in paths)
    stored = {}
    for path in paths:
        own = path[:-1] if is_state else path
        if is_trainers and own[0] != "params":
            continue
        name = ".".join(own[1:] if is_trainers else own)
        if name in stored:
            raise ValueError(f"{name} is there twice")
        stored[name] = ".".join(path)
    if not stored:
        raise ValueError("there is no array in its tree")
    return stored


def _arrays_of(entries: Any) -> list[dict[str, Any]]:
    try:
        return [
            entry
            for entry in entries.values()
            if entry["value_metadata"]["value_type"] in ARRAYS
            and not entry["value_metadata"].get("skip_deserialize")
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{TREE_FILE} has no usable tree_metadata: {error!r}") from error


def _path(entry: dict[str, Any]) -> list[str]:
    try:
        path = [str(key["key"]) for key in entry["key_metadata"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{TREE_FILE} has no usable tree_metadata: {error!r}") from error
    if not path:
        raise ValueError("its tree is a single array, which has no name")
    return path


def _tensor(name: str, array: Any) -> Tensor:
    dtype = np.dtype(array.dtype.numpy_dtype)
    for layout in (array.chunk_layout.read_chunk, array.chunk_layout.write_chunk):
        sizes = zip(layout.shape or (), array.shape, strict=True) if array.ndim else ()
        if any(chunk > max(size, 1) for chunk, size in sizes):  # would be made to read any of it
            raise ValueError(f"{name}: its chunks are larger than itself")
    return Tensor(dtype, tuple(array.shape), 0)

"""Writes tensors as an orbax checkpoint: a flat tree of their names, in chunks.

A chunk is small enough that a device which holds a part of a tensor reads little beyond it, along
whichever axis it is cut. Weights do not compress, so nothing tries to.
"""

import concurrent.futures
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from jaxserve.models.checkpoint import deal
from jaxserve.models.safetensors_file import Tensor

CHUNK_BYTES = 2 << 20  # quickest to read of 1, 2 and 8 MiB
# Of tensors that are in memory at a time, of which orbax makes a copy; each group is saved as a
# process of its own would be, with files of its own, so that there may not be too many.
GROUP_BYTES = 256 << 20
MOST_GROUPS = 64
READERS = 4


def write_orbax(
    folder: pathlib.Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], np.ndarray],
    max_file_bytes: int,
) -> None:
    """`folder` is absolute and not there yet.

    Args:
      tensors: of what dtype and shape `read` returns them. `read` is called from several threads.
      max_file_bytes: about how large a file may become.

    Raises:
      ValueError: orbax cannot hold a tensor.
    """
    from orbax.checkpoint import v1  # a second: only for those who want it

    if set("*?[") & set(str(folder)):  # it looks for what it has written with a pattern
        raise ValueError(f"{folder}: orbax writes to no path with any of * ? [ in it")
    for name, tensor in tensors.items():
        if not tensor.nbytes:
            raise ValueError(f"{name}: orbax does not hold a tensor without elements")
    context = v1.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = True
    saving.use_compression = False
    saving.ocdbt_target_data_file_size = max_file_bytes
    saving.storage_options.chunk_byte_size = min(CHUNK_BYTES, max_file_bytes)
    with context, concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for names in _groups(tensors):
            v1.partial.save(folder, dict(zip(names, pool.map(read, names), strict=True)))
        v1.partial.finalize(folder)


def _groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    total = sum(tensor.nbytes for tensor in tensors.values())
    return deal(tensors, max(GROUP_BYTES, total // MOST_GROUPS))

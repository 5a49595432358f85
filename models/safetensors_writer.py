"""Writes tensors as a folder of safetensors, each file up to a size, tensor by tensor."""

import concurrent.futures
import json
import os
import pathlib
import struct
from collections.abc import Callable, Mapping

import numpy as np

from jaxserve.models.checkpoint import INDEX_FILE, deal
from jaxserve.models.safetensors_file import DTYPES, Tensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRITERS = 4  # threads, each with one tensor in memory
METADATA = {"format": "pt"}  # what transformers asks for: rows first, as everywhere


def write_safetensors(
    folder: pathlib.Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], np.ndarray],
    max_file_bytes: int,
) -> list[pathlib.Path]:
    """Returns the files: one, or several and their index.

    Args:
      tensors: of what dtype and shape `read` returns them. `read` is called from several threads.
      max_file_bytes: of tensors in a file; one that is larger has a file of its own.

    Raises:
      ValueError: safetensors has no such dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name}: safetensors has no dtype {tensor.dtype}")
    shards = deal(tensors, max_file_bytes)
    paths, weight_map = [], {}
    for i, names in enumerate(shards):
        number = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        paths.append(folder / f"model{number}.safetensors")
        _write_file(paths[-1], {name: tensors[name] for name in names}, read)
        weight_map |= dict.fromkeys(names, paths[-1].name)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        paths.append(folder / INDEX_FILE)
        paths[-1].write_text(json.dumps(index, indent=2) + "\n")
    return paths


def _write_file(
    path: pathlib.Path, tensors: Mapping[str, Tensor], read: Callable[[str], np.ndarray]
) -> None:
    entries, starts, end = {"__metadata__": METADATA}, {}, 0
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.nbytes
        offsets = [starts[name], end]
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
        file.flush()

        def copy(name: str) -> None:
            content = memoryview(read(name).reshape(-1).view(np.uint8))
            position = 8 + len(header) + starts[name]
            while len(content):
                count = os.pwrite(file.fileno(), content, position)
                content, position = content[count:], position + count

        with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(copy, tensors))
        os.fsync(file.fileno())

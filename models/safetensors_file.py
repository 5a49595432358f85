"""Reads safetensors (https://huggingface.co/docs/safetensors) with `pread`, FP8 included.

Never a memory map: a file that a trainer truncates while it is mapped kills the process. The
header is checked in full before any of it is believed, because a checkpoint is untrusted input.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxserve.models.file_identity import check_unchanged

MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: bytes `start` to `start + nbytes` of its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Rows:
    """Boxes of tensors that are bytes in row order."""

    tensors: dict[str, Tensor]

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        raise NotImplementedError

    def read_box(
        self, name: str, shape: Sequence[int], box: Sequence[tuple[int, int]], out: np.ndarray
    ) -> None:
        """Fills `out`, in its dtype, from a box (start and stop of each axis) of a tensor that is
        seen in `shape`, the same numbers in the same order. Raises ValueError, OSError."""
        dtype = self.tensors[name].dtype
        while len(shape) > 1 and shape[0] == 1:  # so that the first axis is the one that is cut
            shape, box, out = shape[1:], box[1:], out[0]
        (first, last), inner = box[0], box[1:]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        is_whole_rows = all(cut == (0, size) for cut, size in zip(inner, shape[1:], strict=True))
        if is_whole_rows and out.dtype == dtype:
            blocks = [out] if out.flags.c_contiguous else out
            for i, block in enumerate(blocks):
                self.read_into(name, (first + i) * row_bytes, block)
        else:
            rows = np.empty((last - first, *shape[1:]), dtype)
            self.read_into(name, first * row_bytes, rows)
            out[...] = rows[(slice(None), *(slice(*cut) for cut in inner))].astype(out.dtype)


class SafetensorsFile(_Rows):
    """An open file and its checked header."""

    def __init__(self, path: str | pathlib.Path, descriptor: int | None = None):
        """Opens the file, or takes over the descriptor of one that is open.

        Raises ValueError, naming the file, where the header is not sound.
        """
        self.path = pathlib.Path(path)
        self.descriptor = os.open(self.path, os.O_RDONLY) if descriptor is None else descriptor
        try:
            self._opened = os.fstat(self.descriptor)
            self.tensors = _read_header(
                self._opened.st_size, lambda count, start: os.pread(self.descriptor, count, start)
            )
        except BaseException as error:
            os.close(self.descriptor)
            if isinstance(error, ValueError):
                raise ValueError(f"{self.path}: {error}") from error
            raise

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        """Fills the contiguous `out` from the tensor's bytes at `offset`; dtypes must be equal."""
        view, position = _destination(self.tensors[name], offset, out)
        while len(view):
            try:
                count = os.preadv(self.descriptor, [view], position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not count:
                raise ValueError(f"{self.path}: ends inside {name}; was it rewritten?")
            view, position = view[count:], position + count

    def check_unchanged(self) -> None:
        """Raises ValueError where the file was rewritten since it was opened."""
        check_unchanged(self.path, self.descriptor, self._opened)

    def descriptors(self) -> dict[pathlib.Path, int]:
        return {self.path: self.descriptor}

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class SafetensorsBytes(_Rows):
    """The same of a file's content that is in memory."""

    def __init__(self, name: str, content: bytes):
        """Raises ValueError, with this name, where the header is not sound."""
        self.path = pathlib.Path(name)
        self._content = content
        try:
            self.tensors = _read_header(
                len(content), lambda count, start: content[start : start + count]
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        """As `SafetensorsFile.read_into`."""
        view, position = _destination(self.tensors[name], offset, out)
        view[:] = memoryview(self._content)[position : position + len(view)]

    def descriptors(self) -> dict[pathlib.Path, int]:
        return {}

    def check_unchanged(self) -> None:
        """Nobody else has it."""

    def close(self) -> None:
        pass


def _destination(tensor: Tensor, offset: int, out: np.ndarray) -> tuple[memoryview, int]:
    """The bytes of `out`, and where in the file they begin."""
    assert out.flags.c_contiguous and out.dtype == tensor.dtype
    assert offset >= 0 and offset + out.nbytes <= tensor.nbytes
    return memoryview(out.reshape(-1).view(np.uint8)), tensor.start + offset


def _read_header(size: int, pread: Callable[[int, int], bytes]) -> dict[str, Tensor]:
    """The tensors of `size` bytes; `pread` gives so many of them from a position on."""
    prefix = pread(8, 0)
    if len(prefix) < 8:
        raise ValueError("too short for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"header of {length} bytes in a file of {size}")
    try:
        entries = json.loads(pread(length, 8), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError("header is no JSON object")
    entries.pop("__metadata__", None)
    tensors = {name: _parse_entry(name, entry, 8 + length) for name, entry in entries.items()}
    _check_coverage(tensors, 8 + length, size)
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an entry is given twice")
    return entries


def _parse_entry(name: str, entry: Any, data_start: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name}: entry lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r} is not read; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(n) for n in (*shape, begin, end)):
        raise ValueError(f"{name}: shape and offsets must be whole numbers that are not negative")
    tensor = Tensor(DTYPES[dtype], tuple(shape), data_start + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name}: {end - begin} bytes for {dtype}{shape}")
    return tensor


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _check_coverage(tensors: dict[str, Tensor], position: int, file_size: int) -> None:
    """The tensors fill the rest of the file, without holes or overlaps."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != position:
            raise ValueError(f"{name}: begins at byte {tensor.start}, expected {position}")
        position += tensor.nbytes
    if position != file_size:
        raise ValueError(f"has {file_size} bytes, its tensors end at {position}")

"""Writes a model's checkpoint in another format: `jaxserve convert`."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from jaxserve import checksums
from jaxserve.hub import SMALL_FILES
from jaxserve.models.checkpoint import INDEX_FILE, Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.load_format import format_of, open_checkpoint
from jaxserve.models.orbax_writer import write_orbax
from jaxserve.models.registry import create_model
from jaxserve.models.safetensors_file import Tensor
from jaxserve.models.safetensors_writer import write_safetensors

ORBAX_FOLDER = "orbax"  # in the target, beside config.json
CASTABLE = ("float16", "bfloat16", "float32", "float64")
NOT_COPIED = (INDEX_FILE, checksums.FILE, "commit_success.txt")
DTYPE_KEYS = ("dtype", "torch_dtype")  # of a config.json


def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    to: str | None,
    dtype: str | None,
    max_file_bytes: int,
    on_bytes: Callable[[int, int], None] = lambda count, total: None,
) -> tuple[str, int]:
    """Writes `target`, which is there in whole or not at all. Returns its format, and the bytes of
    its tensors.

    Args:
      to: "orbax" or "safetensors"; the one that `source` is not unless given.
      dtype: of the tensors that are floating point; their own unless given.
      on_bytes: told of bytes as they have been read, and of all there will be.

    Raises:
      FileExistsError: there is a `target`.
      FileNotFoundError, ValueError, OSError: the source is not sound, or cannot be written so.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already")
    from_format = format_of(source)
    to = to or ("orbax" if from_format == "safetensors" else "safetensors")
    checkpoint = open_checkpoint(source, from_format, _abstract(source))
    work = pathlib.Path(os.path.abspath(target)).with_name(f".{target.name}.{os.getpid()}")
    try:
        tensors = _headers(checkpoint, dtype)
        total = sum(tensor.nbytes for tensor in tensors.values())

        def read(name: str) -> np.ndarray:
            array = checkpoint.read(name).astype(tensors[name].dtype, copy=False)
            on_bytes(array.nbytes, total)
            return array

        work.mkdir()
        if to == "orbax":
            write_orbax(work / ORBAX_FOLDER, tensors, read, max_file_bytes)
        else:
            write_safetensors(work, tensors, read, max_file_bytes)
        checkpoint.check_unchanged()
        _check(work, to, tensors)
        checksums.write(work)
        _copy_small_files(source, work, dtype)
        work.rename(target)
    finally:
        checkpoint.close()
        shutil.rmtree(work, ignore_errors=True)
    return to, total


def _abstract(source: pathlib.Path) -> nnx.State | None:
    """Of a model that is served, whose tree may be a fused one; else the names are taken as they
    are."""
    try:
        return create_model(ModelConfig.from_pretrained(source))[1]
    except (ValueError, FileNotFoundError):
        return None


def _headers(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Tensor]:
    headers = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    if dtype is None:
        return headers
    for name, tensor in headers.items():
        if tensor.dtype.name.startswith("float8"):
            raise ValueError(f"--dtype: {name} is {tensor.dtype}, whose scales are other tensors")
    cast = {n: t for n, t in headers.items() if t.dtype.name in CASTABLE}
    return headers | {n: Tensor(np.dtype(dtype), t.shape, 0) for n, t in cast.items()}


def _check(work: pathlib.Path, to: str, tensors: dict[str, Tensor]) -> None:
    """That whoever reads it finds everything."""
    written = open_checkpoint(work, to)
    try:
        found = {name: written.tensor(name) for name in written.names()}
    finally:
        written.close()
    wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} != wanted:
        raise ValueError(f"{work}: what was written is not what it should be")


def _copy_small_files(source: pathlib.Path, target: pathlib.Path, dtype: str | None) -> None:
    """Configuration and tokenizer."""
    found = {path for pattern in SMALL_FILES for path in source.glob(pattern) if path.is_file()}
    for path in sorted(found):
        if path.name not in NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    config = target / "config.json"
    if dtype is not None and config.exists():
        raw: dict[str, Any] = json.loads(config.read_text())
        raw |= {key: dtype for key in DTYPE_KEYS if key in raw}
        config.write_text(json.dumps(raw, indent=2) + "\n")

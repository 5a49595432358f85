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
from jaxserve.models.pooling import MODULES_FILE, read_modules
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
      on_bytes: told of bytes as they have been read, and of all there will be; those of files with
        checksums beside them are read twice.

    Raises:
      FileExistsError: there is a `target`.
      FileNotFoundError, ValueError, OSError: the source is not sound, nor what its checksums say,
        or cannot be written so.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already")
    from_format = format_of(source)
    to = to or ("orbax" if from_format == "safetensors" else "safetensors")
    checkpoint = open_checkpoint(source, from_format, _abstract(source))
    work = pathlib.Path(os.path.abspath(target)).with_name(f".{target.name}.{os.getpid()}")
    try:
        _make_folder(work, target)
        tensors = _headers(checkpoint, dtype)
        size = sum(tensor.nbytes for tensor in tensors.values())
        total = size + _checksummed_bytes(source, checkpoint)
        checksums.verify(source, checkpoint.descriptors(), lambda count: on_bytes(count, total))

        def read(name: str) -> np.ndarray:
            array = _cast(name, checkpoint.read(name), tensors[name].dtype)
            on_bytes(array.nbytes, total)
            return array

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
    return to, size


def _make_folder(work: pathlib.Path, target: pathlib.Path) -> None:
    """Raises OSError with the name of `target`, the one that was given."""
    try:
        work.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def _checksummed_bytes(source: pathlib.Path, checkpoint: Checkpoint) -> int:
    """That are read to compare them with checksums."""
    files = checkpoint.descriptors().values() if (source / checksums.FILE).exists() else ()
    return sum(os.fstat(descriptor).st_size for descriptor in files)


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


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Raises ValueError where a number becomes infinite; names the tensor."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # what is told of it names no tensor
        cast = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(cast)
    if lost.any():
        worst = float(np.abs(array[lost]).max())
        raise ValueError(f"--dtype: {name} holds {worst:g}, which is too large for {dtype}")
    return cast


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
    """Configuration and tokenizer, and the folders of what sentence-transformers does after it."""
    found = {path for pattern in SMALL_FILES for path in source.glob(pattern) if path.is_file()}
    for path in sorted(found):
        if path.name not in NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    for module in read_modules(source) if (source / MODULES_FILE).exists() else ():
        if (source / module.folder).is_dir():
            if module.folder:
                shutil.copytree(source / module.folder, target / module.folder, dirs_exist_ok=True)
        elif module.kind != "Normalize":  # it has no files, and git keeps no empty folder
            raise FileNotFoundError(
                f"{source / module.folder} is missing, which {MODULES_FILE} names"
            )
    config = target / "config.json"
    if dtype is not None and config.exists():
        raw: dict[str, Any] = json.loads(config.read_text())
        raw |= {key: dtype for key in DTYPE_KEYS if key in raw}
        config.write_text(json.dumps(raw, indent=2) + "\n")

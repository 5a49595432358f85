"""What a folder's weights are written as, and the checkpoint that they are."""

import pathlib

from flax import nnx

from jaxserve.models.checkpoint import INDEX_FILE, Checkpoint, OpenFile, open_shards
from jaxserve.models.fused_tensors import FusedTensors, is_fused_by_name
from jaxserve.models.orbax_arrays import OrbaxArrays
from jaxserve.models.orbax_folder import OrbaxFolder, find_orbax

FORMATS = ("safetensors", "orbax")


def format_of(folder: str | pathlib.Path) -> str:
    """Safetensors, unless there are none but an orbax checkpoint."""
    folder = pathlib.Path(folder)
    if (folder / INDEX_FILE).exists() or any(folder.glob("*.safetensors")):
        return "safetensors"
    try:
        find_orbax(folder)
    except (FileNotFoundError, NotADirectoryError):
        return "safetensors"
    except ValueError:
        pass  # whoever opens it will say so
    return "orbax"


def open_checkpoint(
    folder: str | pathlib.Path,
    load_format: str = "auto",
    abstract: nnx.State | None = None,
    *,
    name: str | None = None,
    open_file: OpenFile | None = None,
) -> Checkpoint:
    """The checkpoint in a folder, its headers read and checked.

    Args:
      load_format: "auto", or one of FORMATS.
      abstract: the model's parameters. With them a tree that `step.prepare` has fused is read too.
      name: what the folder is called in messages.
      open_file: opens each file for reading.

    Raises:
      FileNotFoundError, ValueError, OSError: there is none, it is not finished or not sound.
    """
    name = str(folder) if name is None else name
    if (format_of(folder) if load_format == "auto" else load_format) == "safetensors":
        return Checkpoint(name, open_shards(folder, open_file))
    arrays = OrbaxArrays(OrbaxFolder(find_orbax(folder), open_file))
    if abstract is not None and is_fused_by_name(arrays.tensors, abstract):
        return Checkpoint(name, [FusedTensors(arrays, abstract)])
    return Checkpoint(name, [arrays])

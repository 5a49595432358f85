"""A checkpoint, opened, and which of its files holds each tensor; those of a folder of
safetensors."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxserve.models.safetensors_file import SafetensorsFile, Tensor

OpenFile = Callable[[pathlib.Path], int]  # a path to a descriptor for reading
INDEX_FILE = "model.safetensors.index.json"


class TensorFile(Protocol):
    """What holds tensors: a file of safetensors, or a whole folder of another format."""

    path: pathlib.Path
    tensors: Mapping[str, Tensor]

    def read_box(
        self, name: str, shape: Sequence[int], box: Sequence[tuple[int, int]], out: np.ndarray
    ) -> None:
        """As `SafetensorsFile.read_box`."""
        ...

    def descriptors(self) -> Mapping[pathlib.Path, int]:
        """Of all that may be read, by the path of each file."""
        ...

    def check_unchanged(self) -> None:
        """Raises ValueError where something was rewritten since it was opened."""
        ...

    def close(self) -> None: ...


class Checkpoint:
    """The files of a folder, opened, and which of them holds each tensor."""

    def __init__(
        self,
        folder: str | pathlib.Path,
        files: Iterable[TensorFile] | None = None,
    ):
        """Args:
          files: in place of those that `open_shards` finds.

        Raises FileNotFoundError where a file is missing, ValueError where one is not sound.
        """
        self.folder = pathlib.Path(folder)
        self.files: list[TensorFile] = list(open_shards(self.folder) if files is None else files)
        self._file_of = {name: file for file in self.files for name in file.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def file_of(self, name: str) -> TensorFile:
        return self._file_of[name]

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].tensors[name]

    def descriptors(self) -> dict[pathlib.Path, int]:
        """Of all open files, by their paths."""
        return {path: fd for file in self.files for path, fd in file.descriptors().items()}

    def read(self, name: str) -> np.ndarray:
        """A whole tensor. Raises ValueError, OSError."""
        tensor = self.tensor(name)
        out = np.empty(tensor.shape, tensor.dtype)
        rows = out if tensor.shape else out.reshape(1)
        box = [(0, size) for size in rows.shape]
        self.file_of(name).read_box(name, rows.shape, box, rows)
        return out

    def check_unchanged(self) -> None:
        """Raises ValueError where a file was rewritten since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_shards(
    folder: str | pathlib.Path, open_file: OpenFile | None = None
) -> list[SafetensorsFile]:
    """Opens the files that hold a folder's tensors: those of its index, else all.

    Raises as `Checkpoint`.
    """
    files: list[SafetensorsFile] = []
    try:
        for path in _shard_paths(pathlib.Path(folder), open_file):
            files.append(SafetensorsFile(path, None if open_file is None else open_file(path)))
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def _shard_paths(folder: pathlib.Path, open_file: OpenFile | None) -> list[pathlib.Path]:
    index = folder / INDEX_FILE
    if index.exists():
        try:
            with open(index if open_file is None else open_file(index)) as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            outside = [name for name in names if pathlib.PurePath(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} has no usable weight_map: {error}") from error
        if outside:
            raise ValueError(f"{index} names files outside its folder: {outside}")
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"Cannot find any model weights with `{folder}`")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return paths


def deal(tensors: Mapping[str, Tensor], most_bytes: int) -> list[list[str]]:
    """Groups of names, each of at most so many bytes or one tensor; in their order, so that what is
    used together lies together."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups

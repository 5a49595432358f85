"""A folder of safetensors, opened, and which file holds each tensor."""

import json
import pathlib
from collections.abc import Callable, Iterable

from jaxserve.models.safetensors_file import SafetensorsBytes, SafetensorsFile, Tensor

OpenFile = Callable[[pathlib.Path], int]  # a path to a descriptor for reading
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """The safetensors files of a folder, opened, and which of them holds each tensor."""

    def __init__(
        self,
        folder: str | pathlib.Path,
        files: Iterable[SafetensorsFile | SafetensorsBytes] | None = None,
    ):
        """Args:
          files: in place of those that `open_shards` finds.

        Raises FileNotFoundError where a file is missing, ValueError where one is not sound.
        """
        self.folder = pathlib.Path(folder)
        self.files = list(open_shards(self.folder) if files is None else files)
        self._file_of = {name: file for file in self.files for name in file.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def file_of(self, name: str) -> SafetensorsFile | SafetensorsBytes:
        return self._file_of[name]

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].tensors[name]

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

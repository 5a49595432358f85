"""Where new weights may come from: a folder, and the hub's cache. Nothing is fetched.

A path is untrusted, and so is what lies there: whoever may write below the root may swap a file
for a link, a pipe or a device at any moment. So each file is opened once, without following a last
link and without waiting, and what has been opened is judged, not what the path was a moment before.
"""

import os
import pathlib
import stat
from collections.abc import Iterable

from jaxserve import hub

NO_WAITING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
OPENED = pathlib.Path("/proc/self/fd")  # where Linux tells what a descriptor is


class WeightsRoot:
    """The folders below which files may be opened."""

    def __init__(self, folders: Iterable[str | pathlib.Path], download_dir: str | None = None):
        self.folders = tuple(pathlib.Path(os.path.realpath(folder)) for folder in folders)
        self._download_dir = download_dir

    def find(self, name: str) -> tuple[pathlib.Path, "WeightsRoot"]:
        """The real folder of a path below the root, or of a hub name that is in the cache, and the
        root that its files are below.

        Raises:
          ValueError: the path leads out of the root.
          FileNotFoundError: there is neither.
        """
        path = pathlib.Path(os.path.realpath(name))
        if path.is_dir() or name.startswith(("/", ".")):
            self._check(path, name)
        if path.is_dir():
            return path, self
        cached = hub.find_cached(name, self._download_dir)
        if cached is None:
            raise FileNotFoundError(f"{name} (repository not found)")
        return cached, WeightsRoot([root_of(cached)])

    def open(self, path: str | pathlib.Path) -> int:
        """A descriptor of a regular file below the root, for reading.

        Raises:
          ValueError: it is something else, or elsewhere.
          FileNotFoundError, OSError: it cannot be opened.
        """
        real = os.path.realpath(path)
        self._check(pathlib.Path(real), path)
        _check_regular(os.lstat(real), path)  # opening a device may do something
        descriptor = os.open(real, NO_WAITING)
        try:
            _check_regular(os.fstat(descriptor), path)
            if OPENED.is_dir():  # a folder above it may have been swapped for a link
                self._check(pathlib.Path(os.readlink(OPENED / str(descriptor))), path)
            os.set_blocking(descriptor, True)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read_text(self, path: str | pathlib.Path, most_bytes: int = 64 << 20) -> str:
        """The content of a small file. Raises as `open`, ValueError where it is larger."""
        with open(self.open(path), "rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"{path} is larger than {most_bytes} bytes")
        return content.decode()

    def _check(self, real: pathlib.Path, name: str | pathlib.Path) -> None:
        if not any(real.is_relative_to(folder) for folder in self.folders):
            raise ValueError(f"{name} is not below --weights-root")  # whose name is our own affair


def root_of(model_folder: str | pathlib.Path) -> pathlib.Path:
    """The default root: the folder that holds the model's. Of a model in the hub's cache, whose
    files are links, its repository; of one at the top of the file system no more than its own."""
    folder = pathlib.Path(os.path.realpath(model_folder))
    if folder.parent.name == "snapshots":
        return folder.parent.parent
    return folder if folder.parent == folder.parent.parent else folder.parent


def _check_regular(found: os.stat_result, path: str | pathlib.Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no regular file")

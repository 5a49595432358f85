"""The folder of a checkpoint that orbax wrote: where it is, whether it is finished, its files.

TensorStore, which reads it, opens files by their names, many times and late. It is given a folder
of links to descriptors that are open already: what has been looked at is what is read, whatever
becomes of the names meanwhile.
"""

import errno
import json
import os
import pathlib
import stat
import tempfile

from jaxserve.models.checkpoint import OpenFile
from jaxserve.models.file_identity import check_unchanged

TREE_FILE = "_METADATA"  # the tree's names, beside the arrays
MANIFEST = "manifest.ocdbt"
COMMIT_FILE = "_CHECKPOINT_METADATA"
DEPTH = 2  # of the search: a model's folder, a checkpoint in it, one of the items in that
UNFINISHED = (".orbax-checkpoint-tmp", ".partial_save")  # parts of a name
MOST_METADATA_BYTES = 256 << 20


def find_orbax(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder with the tree: the given one, or the only one of those it holds. Of the items of
    one checkpoint that is `params`, should there be several.

    Raises:
      FileNotFoundError: there is none.
      ValueError: there are several, or it is not finished.
    """
    folder = pathlib.Path(folder)
    found = _with_tree(folder, DEPTH)
    finished = [path for path in found if not _is_temporary(path)]
    if found and not finished:
        raise ValueError(f"{found[0]} is not finished: whoever saved it was interrupted")
    items = [path for path in finished if path.name == "params"]
    chosen = items if len(items) == 1 and len({p.parent for p in finished}) == 1 else finished
    if not chosen:
        raise FileNotFoundError(f"Cannot find any orbax checkpoint with `{folder}`")
    if len(chosen) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in chosen)
        raise ValueError(f"{folder} has several orbax checkpoints: {names}; name the folder of one")
    return chosen[0]


def _with_tree(folder: pathlib.Path, depth: int) -> list[pathlib.Path]:
    if (folder / TREE_FILE).exists():
        return [folder]
    inner = sorted(path for path in folder.iterdir() if depth and path.is_dir())
    return [found for path in inner for found in _with_tree(path, depth - 1)]


def _is_temporary(path: pathlib.Path) -> bool:
    return any(part in name for name in path.parts for part in UNFINISHED)


class OrbaxFolder:
    """All files of the folder that holds a tree, open."""

    def __init__(self, path: pathlib.Path, open_file: OpenFile | None = None):
        """Raises ValueError, OSError: it is not finished, or a file is not a regular one."""
        self.path = path
        self.descriptors: dict[pathlib.Path, int] = {}
        self._links = tempfile.TemporaryDirectory(  # removed even by who forgets to close it
            prefix="jaxserve-orbax-", ignore_cleanup_errors=True
        )
        self.view = pathlib.Path(self._links.name)
        try:
            self._open_all(path, self.view, open_file or _open)
            self._opened = {path: os.fstat(fd) for path, fd in self.descriptors.items()}
            self.tree = _parse(path / TREE_FILE, self.descriptors[path / TREE_FILE])
            self._check_finished(open_file or _open)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                raise ValueError(f"{path} has more files than `ulimit -n` allows") from error
            raise

    @property
    def is_ocdbt(self) -> bool:
        """Whether the arrays are in one key-value store; older trees do not tell."""
        return self.tree.get("use_ocdbt", self.path / MANIFEST in self.descriptors)

    def check_unchanged(self) -> None:
        """Raises ValueError where a file was written to since it was opened, or another has its
        name now."""
        for path, descriptor in self.descriptors.items():
            check_unchanged(path, descriptor, self._opened[path])

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors = {}
        self._links.cleanup()

    def _open_all(self, folder: pathlib.Path, view: pathlib.Path, open_file: OpenFile) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                if path.is_symlink():
                    raise ValueError(f"{path} is a link to a folder, which an orbax one may not be")
                (view / path.name).mkdir()
                self._open_all(path, view / path.name, open_file)
            else:
                descriptor = open_file(path)
                self.descriptors[path] = descriptor
                (view / path.name).symlink_to(f"/dev/fd/{descriptor}")

    def _check_finished(self, open_file: OpenFile) -> None:
        """Of a tree's own folder, or of that of the items it is one of."""
        for folder in (self.path, self.path.parent):
            path = folder / COMMIT_FILE
            if path.exists():
                descriptor = open_file(path)
                try:
                    commit = _parse(path, descriptor).get("commit_timestamp_nsecs", 0)
                finally:
                    os.close(descriptor)
                if commit is None:
                    raise ValueError(f"{folder} is not finished: {COMMIT_FILE} has no commit in it")
                break
        if self.is_ocdbt and self.path / MANIFEST not in self.descriptors:
            raise ValueError(f"{self.path} is not finished: it lacks {MANIFEST}")


def _parse(path: pathlib.Path, descriptor: int) -> dict:
    if os.fstat(descriptor).st_size > MOST_METADATA_BYTES:
        raise ValueError(f"{path} is larger than {MOST_METADATA_BYTES} bytes")
    try:
        content = json.loads(os.pread(descriptor, MOST_METADATA_BYTES, 0))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def _open(path: pathlib.Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file")
    return descriptor

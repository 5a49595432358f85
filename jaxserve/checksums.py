"""A folder's checksum file: SHA256SUMS, as `sha256sum *.safetensors > SHA256SUMS` writes it."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping

FILE = "SHA256SUMS"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
PIECE_BYTES = 8 << 20
THREADS = 4  # hashing leaves the GIL


def parse(content: str) -> dict[str, str]:
    """Digests by file name. Raises ValueError for a line that is none of sha256sum's."""
    found = {}
    for line in filter(None, content.splitlines()):
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{FILE}: {line[:80]!r} is no line of sha256sum")
        found[match[2].removeprefix("./")] = match[1].lower()
    return found


def verify(
    folder: pathlib.Path,
    files: Mapping[pathlib.Path, int],
    on_bytes: Callable[[int], None],
    read_text: Callable[[pathlib.Path], str] = pathlib.Path.read_text,
) -> bool:
    """Compares open files below a folder, by their paths, with the FILE in it; False where there is
    none. Raises OSError, and ValueError for one that is not listed, or not what it was then."""
    if not (folder / FILE).exists():
        return False
    expected = parse(read_text(folder / FILE))
    names = {str(path.relative_to(folder)): descriptor for path, descriptor in files.items()}
    for name in names:
        if name not in expected:
            raise ValueError(f"{FILE} does not list {name}")
    for name, digest in digests(names, on_bytes).items():
        if digest != expected[name]:
            raise ValueError(f"{name} is not what {FILE} says: its SHA-256 differs")
    return True


def digests(
    files: Mapping[str, int], on_bytes: Callable[[int], None] = lambda count: None
) -> dict[str, str]:
    """The SHA-256 of each open file. Raises OSError."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda descriptor: _digest(descriptor, on_bytes), files.values())
        return dict(zip(files, found, strict=True))


def write(folder: pathlib.Path) -> None:
    """Of all that is in a folder, and below it. Raises OSError."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with contextlib.ExitStack() as stack:
        files = {str(p.relative_to(folder)): stack.enter_context(p.open("rb")) for p in paths}
        found = digests({name: file.fileno() for name, file in files.items()})
    (folder / FILE).write_text("".join(f"{found[name]}  {name}\n" for name in found))


def _digest(descriptor: int, on_bytes: Callable[[int], None]) -> str:
    sha256, position = hashlib.sha256(), 0
    while piece := os.pread(descriptor, PIECE_BYTES, position):
        sha256.update(piece)
        position += len(piece)
        on_bytes(len(piece))
    return sha256.hexdigest()

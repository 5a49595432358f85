"""A folder's checksum file: SHA256SUMS, as `sha256sum *.safetensors > SHA256SUMS` writes it."""

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Callable, Iterable

from jaxserve.models.safetensors_file import SafetensorsFile

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
    files: Iterable[SafetensorsFile], expected: dict[str, str], on_bytes: Callable[[int], None]
) -> None:
    """Raises ValueError for a file that is not listed, or is not what it was when listed."""
    files = list(files)
    for file in files:
        if file.path.name not in expected:
            raise ValueError(f"{FILE} does not list {file.path.name}")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda file: _digest(file.descriptor, on_bytes), files)
        for file, digest in zip(files, digests, strict=True):
            if digest != expected[file.path.name]:
                raise ValueError(f"{file.path.name} is not what {FILE} says: its SHA-256 differs")


def _digest(descriptor: int, on_bytes: Callable[[int], None]) -> str:
    sha256, position = hashlib.sha256(), 0
    while piece := os.pread(descriptor, PIECE_BYTES, position):
        sha256.update(piece)
        position += len(piece)
        on_bytes(len(piece))
    return sha256.hexdigest()

"""Whether a file that is open is still what it was."""

import os
import pathlib


def check_unchanged(path: pathlib.Path, descriptor: int, opened: os.stat_result) -> None:
    """Raises ValueError where the file was written to since it was opened, or where another has
    its name now: what was read is neither the old content nor the new."""
    stats = [os.fstat(descriptor)]
    if path.exists():
        stats.append(os.stat(path))
    if any(_identity(stat) != _identity(opened) for stat in stats):
        raise ValueError(f"{path} was rewritten while it was read")


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

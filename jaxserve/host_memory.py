"""How much memory this process could still take from the machine."""

import pathlib

MEMINFO = pathlib.Path("/proc/meminfo")
CGROUP = pathlib.Path("/sys/fs/cgroup")


def available(meminfo: pathlib.Path = MEMINFO, cgroup: pathlib.Path = CGROUP) -> int | None:
    """Bytes, of the machine or of the container where that has less; files that the kernel only
    caches count as free. None where the system does not tell."""
    found = [_machine(meminfo), _container(cgroup)]
    return min((number for number in found if number is not None), default=None)


def _machine(meminfo: pathlib.Path) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _container(cgroup: pathlib.Path) -> int | None:
    """Of version 2 of Linux's control groups."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").open())
        return max(limit - used + int(statistics["inactive_file"]), 0)
    except (OSError, ValueError, KeyError):  # "max" is no number: no limit
        return None

"""How long processes have kept CPUs busy, in user and in system mode. Of other processes only Linux
tells, in /proc."""

import os
import pathlib
import resource
from collections.abc import Iterable
from typing import NamedTuple

PROC = pathlib.Path("/proc")
ESTABLISHED = "01"


class CpuTime(NamedTuple):
    """Seconds."""

    user: float = 0.0
    system: float = 0.0

    @property
    def total(self) -> float:
        return self.user + self.system

    def __add__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.user + other.user, self.system + other.system)

    def __sub__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.user - other.user, self.system - other.system)


def own() -> CpuTime:
    """Of this process, with all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return CpuTime(usage.ru_utime, usage.ru_stime)


def of_tree(root: int) -> CpuTime:
    """Of a process and all that descend from it, those that have ended included."""
    tick = os.sysconf("SC_CLK_TCK")
    total = CpuTime()
    for pid in tree(root):
        fields = _stat(pid)
        if fields:
            # utime, stime, and the same of children that have ended and were waited for
            user, system, ended_user, ended_system = map(int, fields[11:15])
            total += CpuTime((user + ended_user) / tick, (system + ended_system) / tick)
    return total


def tree(root: int) -> list[int]:
    """A process and its descendants, as far as they run; [] if it does not."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
    found = [root] if _stat(root) else []
    for pid in found:
        found += children.get(pid, [])
    return found


def command_of(pid: int) -> list[str]:
    """The words of its command line; [] if it has ended."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [word.decode(errors="replace") for word in words[:-1]]


def peer_of(local_port: int, remote_port: int) -> int | None:
    """The process on this machine at the other end of our TCP connection, from `local_port` to
    `remote_port`; None if it runs elsewhere, or belongs to somebody whom we may not look at."""
    sockets = _sockets(local_port=remote_port, remote_port=local_port)
    for pid in _pids() if sockets else ():
        try:
            links = {os.readlink(link) for link in (PROC / str(pid) / "fd").iterdir()}
        except OSError:
            continue  # not ours, or it has just ended
        if links & sockets:
            return pid
    return None


def _sockets(local_port: int, remote_port: int) -> set[str]:
    """The established connections between two ports, as /proc/PID/fd shows them."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for _, local, remote, state, *_, inode in (line.split()[:10] for line in lines):
            ports = [int(address.rpartition(":")[2], 16) for address in (local, remote)]
            if state == ESTABLISHED and ports == [local_port, remote_port]:
                found.add(f"socket:[{inode}]")
    return found


def _pids() -> Iterable[int]:
    return [int(entry.name) for entry in PROC.glob("[0-9]*")] if PROC.is_dir() else []


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; [] where there are none."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []

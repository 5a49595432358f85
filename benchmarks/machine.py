"""What a machine allows: bytes per second of its disk, its page cache and its bus to the device.

`python benchmarks/machine.py` prints the last of these as JSON."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

BLOCK_BYTES = 64 << 20
THREADS = 4  # as the server reads


def allowed_rates(folder: pathlib.Path) -> dict[str, float]:
    """Of reading a folder's safetensors files, and of copying to the device."""
    command = [sys.executable, __file__]  # a process of its own: it must leave the device
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return page_cache_and_disk(sorted(folder.glob("*.safetensors"))) | found


def page_cache_and_disk(paths: list[pathlib.Path]) -> dict[str, float]:
    """Bytes per second of reading the files with the server's number of threads."""
    for path in paths:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"disk": read_rate(paths), "page_cache": max(read_rate(paths) for _ in range(2))}


def read_rate(paths: list[pathlib.Path]) -> float:
    pieces = [
        (path, start) for path in paths for start in range(0, path.stat().st_size, 16 * BLOCK_BYTES)
    ]

    def read(piece: tuple[pathlib.Path, int]) -> int:
        path, start = piece
        buffer, total = np.empty(BLOCK_BYTES, np.uint8), 0
        with path.open("rb", buffering=0) as file:
            for position in range(start, start + 16 * BLOCK_BYTES, BLOCK_BYTES):
                total += os.preadv(file.fileno(), [buffer], position)
        return total

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(read, pieces))
    return total / (time.perf_counter() - began)


def bus() -> dict[str, float]:
    """Bytes per second from the host to the device."""
    import jax

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    values = np.ones((16, BLOCK_BYTES), np.uint8)
    pinned = jax.device_put(values, device.with_memory_kind("pinned_host"))
    rates = {}
    for name, source in (("bus", pinned), ("bus_from_pageable_memory", values)):
        times = []
        for _ in range(4):
            began = time.perf_counter()
            jax.device_put(source, device).block_until_ready()
            times.append(time.perf_counter() - began)
        rates[name] = values.nbytes / min(times)
    return rates


if __name__ == "__main__":
    print(json.dumps(bus()))

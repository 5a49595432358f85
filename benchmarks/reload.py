"""Times updates of the weights of a running server, and what a running stream sees of them.

    python benchmarks/reload.py --model llama-3.1-8b --folder /tmp/reload --way host

Writes a checkpoint of random weights unless the folder has one, starts a server on it, and reloads
the same folder again and again while one request decodes (`in_flight: in_place`). Prints a JSON
object: per reload the seconds from the request to its answer, those of loading and of the pause
between two steps, and the longest gap between two tokens; GB/s; what the page cache, the disk and
the bus to the device allow; memory before and after; programs compiled meanwhile.
"""

import argparse
import contextlib
import json
import math
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
from machine import allowed_rates
from random_checkpoint import LLAMA, MODELS, write_checkpoint


def main() -> None:
    options = parse()
    folder = options.folder
    if not (folder / "config.json").exists():
        write_checkpoint(folder, LLAMA | MODELS[options.model])
    floors = allowed_rates(folder)
    print(f"bytes per second at most: {floors}", file=sys.stderr)
    with serving(folder, options.way, options.port, options.server_args) as client:
        print(json.dumps(measure(client, folder, options.reloads) | {"floors": floors}, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--folder", type=pathlib.Path, help="of the checkpoint", default="reload")
    parser.add_argument("--way", choices=("aside", "host", "in-place"), default="host")
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--port", type=int, default=30123)
    parser.add_argument("server_args", nargs="*", help="after --: more flags for the server")
    return parser.parse_args()


@contextlib.contextmanager
def serving(folder: pathlib.Path, way: str, port: int, more: list[str]) -> Iterator[httpx.Client]:
    command = [sys.executable, "-m", "jaxserve.server", "--model-path", str(folder)]
    command += ["--skip-tokenizer-init", "--weight-reload", way, "--port", str(port)]
    command += ["--log-level", "warning", *more]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None) as client:
            while not is_up(client):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with exit code {process.returncode}")
                time.sleep(0.5)
            yield client
    finally:
        process.terminate()
        process.wait()


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


class Stream(threading.Thread):
    """One request after the other, and when its tokens came."""

    def __init__(self, base_url: httpx.URL):
        super().__init__(daemon=True)
        self.gaps: list[tuple[float, float]] = []  # when each ended, and how long it was
        self.is_over = threading.Event()
        self._base_url = base_url

    def run(self) -> None:
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": None}
        with httpx.Client(base_url=self._base_url, timeout=None) as client:
            while not self.is_over.is_set():
                body = {"input_ids": [5, 6, 7], "sampling_params": params, "stream": True}
                with client.stream("POST", "/generate", json=body) as response:
                    response.raise_for_status()
                    self._follow(response)

    def _follow(self, response: httpx.Response) -> None:
        last = None
        for line in response.iter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now
            if self.is_over.is_set():
                return

    def longest_gap(self, start: float, end: float) -> float:
        """Of those that were there at any time between."""
        gaps = [gap for ended, gap in self.gaps if ended >= start and ended - gap <= end]
        return max(gaps, default=math.nan)


def measure(client: httpx.Client, folder: pathlib.Path, count: int) -> dict:
    stream = Stream(client.base_url)
    stream.start()
    time.sleep(3.0)
    now = time.perf_counter()
    typical = statistics.median(gap for _, gap in stream.gaps)
    undisturbed = stream.longest_gap(now - 2.0, now)
    before, reloads = state(client), []
    for _ in range(count):
        began = time.perf_counter()
        body = {"model_path": str(folder), "in_flight": "in_place"}
        client.post("/update_weights_from_disk", json=body).raise_for_status()
        seconds = time.perf_counter() - began
        time.sleep(0.5)  # for tokens to come
        update = state(client)["last_update"]
        reloads.append(
            {
                "seconds": seconds,
                "load_seconds": update["load_seconds"],
                "pause_ms": update["pause_seconds"] * 1e3,
                "longest_gap_ms": stream.longest_gap(began, began + seconds) * 1e3,
                "gb_per_s": update["num_bytes"] / seconds / 1e9,
            }
        )
        print(reloads[-1], file=sys.stderr)
    stream.is_over.set()
    after = state(client)
    names = ("device_bytes_in_use", "compiled_after_ready", "traced_after_ready")
    return {
        "way": after["weight_reload"],
        "bytes": after["last_update"]["num_bytes"],
        "typical_gap_ms": typical * 1e3,
        "longest_gap_undisturbed_ms": undisturbed * 1e3,
        "median": {k: statistics.median(r[k] for r in reloads) for k in reloads[0]},
        "reloads": reloads,
        "before": {name: before[name] for name in names},
        "after": {name: after[name] for name in names},
    }


def state(client: httpx.Client) -> dict:
    return client.get("/server_info").json()["internal_states"][0]


if __name__ == "__main__":
    main()

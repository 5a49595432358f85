"""Times updates of the weights of a running server, and what a running stream sees of them.

    python benchmarks/reload.py --model llama-3.1-8b --folder /tmp/reload --way host

Writes a checkpoint of random weights unless the folder has one, starts a server on it, and reloads
the same folder again and again while one request decodes (`in_flight: in_place`). Prints a JSON
object: per reload the seconds from the request to its answer, those of loading and of the pause
between two steps, and the longest gap between two tokens; GB/s; what the page cache, the disk and
the bus to the device allow; memory before and after; programs compiled meanwhile.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np

MODELS = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
SHARD_BYTES = 5 << 30
BLOCK_BYTES = 64 << 20
THREADS = 4  # as the server reads


def main() -> None:
    options = parse()
    if options.bus:
        print(json.dumps(bus()))
        return
    folder = options.folder
    if not (folder / "config.json").exists():
        write_checkpoint(folder, LLAMA | MODELS[options.model])
    floors = page_cache_and_disk(sorted(folder.glob("*.safetensors")))
    command = [sys.executable, __file__, "--bus"]  # a process of its own: it must leave the device
    floors |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
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
    parser.add_argument("--bus", action="store_true", help="only time copies to the device")
    parser.add_argument("server_args", nargs="*", help="after --: more flags for the server")
    return parser.parse_args()


# The checkpoint.


def write_checkpoint(folder: pathlib.Path, config: dict) -> None:
    """Small random weights, the same block of them again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    bits = np.random.default_rng(0).integers(0, 1 << 16, BLOCK_BYTES // 2, np.uint16)
    block = ((bits & 0x80FF) | 0x3C00).tobytes()  # bfloat16 of either sign, about 0.01
    shards, size = [{}], 0
    for name, shape in tensors(config):
        size += 2 * math.prod(shape)
        if size > SHARD_BYTES:
            shards, size = [*shards, {}], 2 * math.prod(shape)
        shards[-1][name] = shape
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(path, shard, block)
        weight_map |= dict.fromkeys(shard, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def tensors(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_shard(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for left in range(end, 0, -len(block)):
            file.write(block[:left])


# What the machine allows.


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


# The server.


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

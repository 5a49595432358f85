"""Times starts of the server from safetensors, with a cold and with a warm compilation cache.

    python benchmarks/start.py --model llama-3.1-8b --folder /tmp/model --cache /tmp/programs

Writes a checkpoint of random weights unless the folder has one. A start lasts from the launch of
the command to the first answer to a request. Prints a JSON object: of each start its seconds and
those of its parts, which overlap; of the same weights the seconds of reading them into the host's
memory alone, and of copying them to the device alone; what the disk, the page cache and the bus
allow.
"""

import argparse
import concurrent.futures
import json
import pathlib
import shutil
import subprocess
import sys
import time

import httpx
from machine import allowed_rates
from random_checkpoint import LLAMA, MODELS, write_checkpoint


def main() -> None:
    options = parse()
    if options.alone:
        print(json.dumps(read_and_transfer(options.folder)))
        return
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.folder, LLAMA | MODELS[options.model])
    rates = allowed_rates(options.folder)  # and the page cache has the files now
    command = [sys.executable, __file__, "--alone", "--folder", str(options.folder)]
    alone = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    shutil.rmtree(options.cache, ignore_errors=True)
    starts = [start(options) for _ in range(1 + options.warm_starts)]
    found = {"cold": starts[0], "warm": starts[1:], "alone": alone, "floors": rates}
    print(json.dumps(found, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--folder", type=pathlib.Path, help="of the checkpoint", default="model")
    parser.add_argument("--cache", type=pathlib.Path, help="of programs", default="programs")
    parser.add_argument("--warm-starts", type=int, default=2)
    parser.add_argument("--port", type=int, default=30124)
    parser.add_argument("--alone", action="store_true", help="only read and copy the weights")
    parser.add_argument("server_args", nargs="*", help="after --: more flags for the server")
    return parser.parse_args()


def start(options: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", "jaxserve.server", "--model-path", str(options.folder)]
    command += ["--skip-tokenizer-init", "--skip-server-warmup", "--port", str(options.port)]
    command += ["--compilation-cache-dir", str(options.cache), *options.server_args]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{options.port}", timeout=60) as client:
            while not is_ready(client):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with exit code {process.returncode}")
                time.sleep(0.05)
            ready = time.perf_counter() - began
            body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}}
            client.post("/generate", json=body).raise_for_status()
            answered = time.perf_counter() - began
            info = client.get("/server_info").json()
    finally:
        process.terminate()
        process.wait()
    state = info["internal_states"][0]
    return {
        "ready_seconds": ready,
        "first_answer_seconds": answered,
        "engine_seconds": info["startup_time"],
        "parts": info["startup_phases"],
        "programs": state["compiled_at_start"],
        "compilation_cache_hits": state["compilation_cache_hits"],
    }


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def read_and_transfer(folder: pathlib.Path) -> dict[str, float]:
    """Seconds of reading all weights as a start does, and of copying them to the device."""
    import jax
    import numpy as np

    from jaxserve.models.checkpoint import Checkpoint
    from jaxserve.models.config import ModelConfig
    from jaxserve.models.registry import create_model
    from jaxserve.models.weights import READERS, ParamReader

    abstract = create_model(ModelConfig.from_pretrained(folder))[1]
    leaves = jax.tree.leaves(abstract)
    reader = ParamReader(Checkpoint(folder), abstract)
    jax.device_put(np.zeros(1), jax.devices()[0]).block_until_ready()  # the device is awake

    def read(number: int) -> np.ndarray:
        shape = leaves[number].shape
        return reader.read(number, tuple(slice(0, size) for size in shape))

    def transfer(values: np.ndarray) -> jax.Array:
        return jax.block_until_ready(jax.device_put(values, jax.devices()[0]))

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        host = list(pool.map(read, range(len(leaves))))
        was_read = time.perf_counter()
        arrays = list(pool.map(transfer, host))
    num_bytes, ended = sum(array.nbytes for array in arrays), time.perf_counter()
    return {"bytes": num_bytes, "read": was_read - began, "transfer": ended - was_read}


if __name__ == "__main__":
    main()

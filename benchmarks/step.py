"""Times the engine's own programs, without scheduler or HTTP: `python benchmarks/step.py --help`.

Decode steps of B rows at one context length, dispatched in several ways. `ms` is the mean of
back-to-back steps; `host` is the time to dispatch one step while the device is idle.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve import programs
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.state import State, StateShape
from jaxserve.step_plan import KEEP, PATCH_HEADER

MODELS = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    "qwen2.5-0.5b": {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
    | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    | {"max_position_embeddings": 8192, "tie_word_embeddings": True},
    "llama-3.1-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"]},
}
PAGE_SIZE = 16


class Step:
    """Compiled programs of one batch size, a state whose rows are all in use, and the weights."""

    def __init__(self, name: str, rows: int, context: int, extend: int, attention: str | None):
        raw = {"architectures": ["Qwen2ForCausalLM"], **MODELS[name]}
        config = ModelConfig.from_dict(raw)
        graphdef, params = create_model(config, key=jax.random.key(0))
        leaves, treedef = jax.tree.flatten(params)
        self.weights = tuple(leaves)
        self.rows, self.extend = rows, extend
        self.width = config.context_length // PAGE_SIZE
        used = -(-(context + extend + 512) // PAGE_SIZE)
        shape = StateShape(
            max_rows=rows,
            pages_per_row=self.width,
            num_layers=config.num_layers,
            num_pages=1 + rows * used,
            page_size=PAGE_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            dtype=jnp.dtype(config.dtype),
        )
        self.state = shape.create()
        self.weight_bytes = sum(leaf.nbytes for leaf in leaves)
        per_token = self.state.kv.k.nbytes * 2 / (shape.num_pages * PAGE_SIZE)
        self.floor_ms = (self.weight_bytes + per_token * context * rows) / 4.3e12 * 1e3

        def merge(weights):
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))

        decode = functools.partial(programs.forward, merge, rows, rows, attention=attention)
        sample = functools.partial(programs.sample, merge, "greedy")
        decode_upload = np.zeros(3 * rows, np.int32)
        decode_upload[:rows], decode_upload[rows : 2 * rows] = np.arange(rows), 1
        decode_upload[2 * rows :] = -1
        self.upload, self.sample_rows = decode_upload, np.arange(rows, dtype=np.int32)
        self.decode = compiled(decode, (1,), self.weights, self.state, decode_upload)
        self.sample = compiled(sample, (1,), self.weights, self.state, self.sample_rows)
        self.fused = compiled(
            lambda weights, state, upload, rows: sample(
                weights, decode(weights, state, upload), rows
            ),
            (1,),
            *(self.weights, self.state, decode_upload, self.sample_rows),
        )
        self.peek = compiled(programs.peek, (), self.state.out)
        self.lines = self.patch_lines(context, used)
        self.patch = compiled(programs.patch, (0,), self.state, self.lines)
        self.state = self.patch(self.state, jax.device_put(self.lines))
        if extend:
            prompt = np.zeros(2 * rows + extend, np.int32)
            prompt[:rows], prompt[rows] = rows, extend
            prompt[0], prompt[2 * rows :] = 0, np.arange(extend) % 500
            self.prompt = prompt
            function = functools.partial(programs.forward, merge, extend, rows, attention=attention)
            self.prefill = compiled(function, (1,), self.weights, self.state, prompt)

    def patch_lines(self, context: int, used: int) -> np.ndarray:
        lines = np.zeros((self.rows, PATCH_HEADER + self.width), np.int32)
        lines[:, 0], lines[:, 1], lines[:, 2] = np.arange(self.rows), context, KEEP
        pages = np.random.default_rng(0).permutation(self.rows * used).reshape(self.rows, used) + 1
        lines[:, PATCH_HEADER : PATCH_HEADER + used] = pages
        return lines

    def split_step(self, state: State) -> State:
        state = self.decode(self.weights, state, jax.device_put(self.upload))
        return self.sample(self.weights, state, jax.device_put(self.sample_rows))

    def fused_step(self, state: State) -> State:
        uploads = jax.device_put((self.upload, self.sample_rows))
        return self.fused(self.weights, state, *uploads)


def compiled(function: Callable, donated: tuple[int, ...], *arguments) -> Callable:
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def run_back_to_back(step: Step, one: Callable, *, read: str, patch: bool, count: int) -> float:
    """Milliseconds per step; `read`: "nothing", "behind" (the previous step's tokens) or "now"."""
    state, previous = step.state, None
    start = time.perf_counter()
    for _ in range(count):
        if patch:
            state = step.patch(state, jax.device_put(step.lines))
        state = one(state)
        if read != "nothing":
            fresh = step.peek(state.out)
            fresh.copy_to_host_async()
            if read == "now":
                np.asarray(fresh)
            elif previous is not None:
                np.asarray(previous)
            previous = fresh
    jax.block_until_ready(state)
    step.state = step.patch(state, jax.device_put(step.lines))
    return (time.perf_counter() - start) / count * 1e3


def host_time(step: Step, one: Callable, *, read: bool, patch: bool) -> float:
    times = []
    for _ in range(8):
        jax.block_until_ready(step.state)
        start = time.perf_counter()
        state = step.state
        if patch:
            state = step.patch(state, jax.device_put(step.lines))
        step.state = one(state)
        if read:
            step.peek(step.state.out).copy_to_host_async()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure(step: Step, count: int) -> dict[str, dict[str, float]]:
    variants = {
        "fused, nothing read": (step.fused_step, "nothing", False),
        "split, nothing read": (step.split_step, "nothing", False),
        "fused, peek": (step.fused_step, "behind", False),
        "split, peek": (step.split_step, "behind", False),
        "split, peek and patch": (step.split_step, "behind", True),
        "split, read at once": (step.split_step, "now", False),
    }
    results = {}
    for name, (one, read, patch) in variants.items():
        run_back_to_back(step, one, read=read, patch=patch, count=3)
        times = [run_back_to_back(step, one, read=read, patch=patch, count=count) for _ in range(3)]
        host = host_time(step, one, read=read != "nothing", patch=patch)
        results[name] = {"ms": statistics.median(times), "host": host}
    if step.extend:
        state, times = step.state, []
        for _ in range(4):
            state = step.patch(state, jax.device_put(step.lines))
            jax.block_until_ready(state)
            start = time.perf_counter()
            state = step.prefill(step.weights, state, jax.device_put(step.prompt))
            jax.block_until_ready(state)
            times.append((time.perf_counter() - start) * 1e3)
        results[f"extend by {step.extend} tokens"] = {"ms": min(times)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-0.5b")
    parser.add_argument("--rows", default="1,64", help="batch sizes")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--extend", type=int, default=0, help="also time a prompt chunk")
    parser.add_argument("--attention", help="implementation (default: the device's best)")
    parser.add_argument("--count", type=int, default=100, help="steps in a row")
    options = parser.parse_args()
    for rows in map(int, options.rows.split(",")):
        step = Step(options.model, rows, options.context, options.extend, options.attention)
        for variant, figures in measure(step, options.count).items():
            figures = {key: round(value, 3) for key, value in figures.items()}
            line = {"model": options.model, "rows": rows, "context": options.context}
            line |= {"variant": variant, **figures, "floor_ms": round(step.floor_ms, 3)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""Times the engine's programs as the engine dispatches them, without scheduler or HTTP.

    python benchmarks/step.py --model llama-3.1-8b --rows 1,64 --context 1024

Decode steps of B rows with dummy weights. `ms` is the mean of back-to-back steps, each followed by
reading the one before; `host` is the time to dispatch one while the device is idle; `floor` is the
bytes of weights and KV cache over 4.3 TB/s, an H200's.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from shapes import MODELS

from jaxserve.buckets import Buckets
from jaxserve.compiler import compile_programs
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.runner import Runner
from jaxserve.state import StateShape
from jaxserve.step_plan import (
    KEEP,
    PATCH_HEADER,
    RUNNING,
    SAMPLERS,
    SAMPLING_START,
    Sampler,
    StepPlan,
)

PAGE_SIZE, CONTEXT_LENGTH = 16, 8192
MEMORY_BYTES_PER_S = 4.3e12  # measured device-to-device on an H200


class Bench:
    """A runner whose rows all decode at one context length."""

    def __init__(self, model: str, rows: int, context: int, num_steps: int, extend: int):
        raw = {
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": CONTEXT_LENGTH,
            **MODELS[model],
        }
        config = ModelConfig.from_dict(raw)
        self.rows, self.context, self.num_steps, self.extend = rows, context, num_steps, extend
        self.pages = -(-(context + extend + 2048) // PAGE_SIZE)
        self.width = PATCH_HEADER + CONTEXT_LENGTH // PAGE_SIZE
        shape = StateShape(
            max_rows=rows,
            pages_per_row=CONTEXT_LENGTH // PAGE_SIZE,
            max_steps=num_steps,
            max_tokens=max(extend, 1),
            num_layers=config.num_layers,
            num_pages=1 + rows * self.pages,
            page_size=PAGE_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=jnp.dtype(config.dtype),
        )
        buckets = Buckets(
            decode_rows=(rows,),
            extend_rows=(rows,),
            extend_tokens=(extend,) if extend else (),
            patch_lines=tuple(sorted({min(4, rows), rows})),
            copies=(1,),
            decode_steps=(num_steps,),
            scores=64,
        )
        params = create_model(config, key=jax.random.key(0))[1]
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        token = 4 * config.num_layers * config.num_kv_heads * config.head_dim
        self.floor = (weights + token * context * rows) / MEMORY_BYTES_PER_S * 1e3
        compiled = compile_programs(*create_model(config), shape, buckets)
        self.runner = Runner(compiled, params, shape, buckets.scores)
        self.fill = self.patch(rows, self.context)

    def patch(self, num_lines: int, seq_len: int) -> bytes:
        """Lines of the first rows, and a batch of all."""
        packed = np.zeros(num_lines * self.width + self.rows, np.int32)
        lines = packed[: -self.rows].reshape(num_lines, self.width)
        own = np.arange(self.rows * self.pages).reshape(self.rows, self.pages) + 1
        lines[:, 0], lines[:, 1], lines[:, 2] = np.arange(num_lines), seq_len, KEEP
        lines[:, 3] = RUNNING if seq_len != KEEP else KEEP
        lines[:, 4], lines[:, 5:SAMPLING_START] = CONTEXT_LENGTH, -1
        lines[:, PATCH_HEADER : PATCH_HEADER + self.pages] = own[:num_lines]
        packed[-self.rows :] = np.arange(self.rows)
        return packed.tobytes()

    def decode(self, patch: bytes = b"", sampler: Sampler = "greedy") -> StepPlan:
        wants_tops = sampler == "full"
        shape = self.rows, self.rows, self.num_steps
        return StepPlan(0, "decode", *shape, sampler, patch=patch, wants_tops=wants_tops)

    def prefill(self) -> StepPlan:
        packed = np.zeros(3 * self.rows + self.extend, np.int32)
        rows, lengths, samples, tokens = np.split(packed, np.arange(1, 4) * self.rows)
        rows[1:], lengths[0], samples[0] = self.rows, self.extend, 1
        tokens[:] = np.arange(self.extend) % 500
        return StepPlan(
            *(0, "extend", self.extend, self.rows, 1, "greedy", packed.tobytes()),
            patch=self.patch(self.rows, 0),
        )

    def back_to_back(self, plans: list[StepPlan], *, ahead: int) -> float:
        """Milliseconds per step, reading `ahead` steps behind the last dispatched one."""
        self.runner.read(self.runner.dispatch(self.decode(self.fill)))
        start, fresh = time.perf_counter(), []
        for plan in plans:
            fresh.append(self.runner.dispatch(plan))
            if len(fresh) > ahead:
                self.runner.read(fresh.pop(0))
        for last in fresh:
            self.runner.read(last)
        return (time.perf_counter() - start) / len(plans) * 1e3

    def host(self, plan: StepPlan) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            fresh = self.runner.dispatch(plan)
            times.append((time.perf_counter() - start) * 1e3)
            self.runner.read(fresh)
        return statistics.median(times)

    def measure(self, count: int):
        steady = self.decode()
        changing = self.decode(self.patch(min(4, self.rows), KEEP))
        some = [changing if i % 16 == 0 else steady for i in range(count)]
        for name, plans, ahead in (
            ("run ahead", [steady] * count, 1),
            ("run ahead, a patch every 16 steps", some, 1),
            ("run ahead, a patch every step", [changing] * count, 1),
            ("read at once", [steady] * count, 0),
        ):
            times = [self.back_to_back(plans, ahead=ahead) for _ in range(4)]
            yield name, statistics.median(times[1:]), self.host(plans[-1])
        for sampler in SAMPLERS[1:]:
            plans = [self.decode(sampler=sampler)] * count
            times = [self.back_to_back(plans, ahead=1) for _ in range(4)]
            yield f"run ahead, {sampler} sampler", statistics.median(times[1:]), self.host(plans[0])
        if self.extend:
            times = []
            for _ in range(4):
                start = time.perf_counter()
                self.runner.read(self.runner.dispatch(self.prefill()))
                times.append((time.perf_counter() - start) * 1e3)
            yield f"a prompt of {self.extend} tokens", min(times), self.host(self.prefill())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-0.5b")
    parser.add_argument("--rows", default="1,64", help="batch sizes")
    parser.add_argument("--steps", default="1,8", help="decode steps in one dispatch")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--extend", type=int, default=0, help="also time a prompt")
    parser.add_argument("--count", type=int, default=64, help="dispatches in a row")
    options = parser.parse_args()
    rows, steps = (map(int, text.split(",")) for text in (options.rows, options.steps))
    for num_rows, num_steps in itertools.product(rows, list(steps)):
        bench = Bench(options.model, num_rows, options.context, num_steps, options.extend)
        for variant, ms, host in bench.measure(options.count // num_steps):
            line = {"model": options.model, "rows": num_rows, "steps": num_steps}
            line |= {"variant": variant, "ms": round(ms, 3), "host_ms": round(host, 3)}
            line |= {"ms_per_token": round(ms / num_steps, 3), "floor_ms": round(bench.floor, 3)}
            print(json.dumps(line), flush=True)
        del bench


if __name__ == "__main__":
    main()

"""Times a layer of experts and its parts, on whatever device is there, and checks what it computes.

    python benchmarks/moe.py --model qwen1.5-moe --tokens 1,8,64,256,1024,4096
    python benchmarks/moe.py --model tiny --tokens 1,7 --repeats 1     # on a CPU

One line of JSON per number of tokens, times in microseconds: `layer` with router and shared expert,
`experts` without, and of these `dispatch`, `grouped_swiglu`, `grouped_matmul` and `combine` alone
(the last four for the Triton kernels only). `floor` is the larger of the bytes of the layer's
weights that are needed over 4.3 TB/s and its operations over 790 TFLOP/s, an H200's; `error` is the
largest difference from the reference in float32, relative to the largest value. `--tune` times the
Triton products with other blocks.
"""

import argparse
import functools
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.moe import SparseMoeBlock
from jaxserve.models.registry import random_params
from jaxserve.models.routing import route
from pallas_kernels import moe
from pallas_kernels.moe import triton
from pallas_kernels.moe.api import PREFERENCE
from pallas_kernels.moe.dispatch import combine

MODELS = {  # experts, choices, hidden size, size of each expert, of the shared one
    "tiny": (8, 2, 64, 48, 64),
    "qwen1.5-moe": (60, 4, 2048, 1408, 5632),
    "qwen3-30b-a3b": (128, 8, 2048, 768, 0),
    "olmoe": (64, 8, 2048, 1024, 0),
    "mixtral-8x7b": (8, 2, 4096, 14336, 0),
}
MEMORY_BYTES_PER_S, OPERATIONS_PER_S = 4.3e12, 790e12
# Different weights one after the other in one dispatch: none are still in the L2 cache, and the
# host's time counts little.
NUM_LAYERS = 8
TUNE = (
    triton.Blocks(64, 64, 4, 4),
    triton.Blocks(64, 128, 4, 3),
    triton.Blocks(64, 128, 4, 4),
    triton.Blocks(128, 64, 4, 3),
    triton.Blocks(128, 64, 8, 3),
    triton.Blocks(128, 64, 8, 4),
    triton.Blocks(128, 128, 8, 2),
    triton.Blocks(32, 128, 4, 4),
)


def config_of(model: str) -> ModelConfig:
    num_experts, choices, hidden, inner, shared = MODELS[model]
    raw = {
        "architectures": ["Qwen2MoeForCausalLM" if shared else "Qwen3MoeForCausalLM"],
        "vocab_size": 32,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 32,
        "num_experts": num_experts,
        "num_experts_per_tok": choices,
        "moe_intermediate_size": inner,
    }
    return ModelConfig.from_dict(
        raw | ({"shared_expert_intermediate_size": shared} if shared else {})
    )


class Bench:
    def __init__(self, model: str, repeats: int):
        config, self.repeats = config_of(model), repeats
        names = ("gate_proj", "up_proj", "down_proj")
        self.dtype = jnp.bfloat16
        self.graphdef, abstract = nnx.split(
            nnx.eval_shape(lambda: SparseMoeBlock(config, self.dtype, names=names))
        )
        std = config.hidden_size**-0.5
        keys = jax.random.split(jax.random.key(0), NUM_LAYERS)
        self.layers = [random_params(abstract, key, std) for key in keys]
        self.config, self.block = config, self.merge(self.layers[0])

    def merge(self, params: nnx.State) -> SparseMoeBlock:
        return nnx.merge(self.graphdef, params)

    def time(self, function, *operands) -> float:
        """Microseconds a call: the median of five means of ten."""
        function = jax.jit(function)
        jax.block_until_ready(function(*operands))
        means = []
        for _ in range(5 if self.repeats > 1 else 1):
            start = time.perf_counter()
            for _ in range(self.repeats):
                out = function(*operands)
            jax.block_until_ready(out)
            means.append((time.perf_counter() - start) / self.repeats)
        return statistics.median(means) * 1e6

    def per_layer(self, one, x: jax.Array) -> float:
        """Of a chain through all layers: what each gives goes into the next."""

        def chain(layers, x):
            for params in layers:
                x = (x + 1e-2 * one(self.merge(params), x)).astype(x.dtype)
            return x

        return self.time(chain, self.layers, x) / NUM_LAYERS

    def measure(self, num_tokens: int) -> dict:
        hidden = self.config.hidden_size
        x = jax.random.normal(jax.random.key(1), (num_tokens, hidden), self.dtype)
        _, expert_ids = jax.jit(self.route)(self.layers[0], x)
        line = {
            "layer": self.per_layer(lambda block, x: block(x, None)[0], x),
            "experts": self.per_layer(lambda block, x: self.experts(block, x), x),
            "floor": self.floor(num_tokens, expert_ids),
            "error": self.error(x),
        }
        return line | self.parts(x) if uses_triton() else line

    def route(self, params: nnx.State, x: jax.Array):
        block = self.merge(params)
        return route(block.gate(x), block.routing)

    def experts(self, block: SparseMoeBlock, x: jax.Array, implementation=None) -> jax.Array:
        weights, expert_ids = route(block.gate(x), block.routing)
        gate_up, down = operands_of(block)
        plan = moe.plan(x, gate_up, expert_ids, implementation=implementation)
        return moe.experts(x, gate_up, down, weights, plan)

    def parts(self, x: jax.Array) -> dict:
        blocks = [self.merge(params) for params in self.layers]
        gate_up, down = zip(*map(operands_of, blocks), strict=True)
        weights, expert_ids = zip(*(jax.jit(self.route)(p, x) for p in self.layers), strict=True)

        def dispatch(gate_up, expert_ids):
            return triton.plan(x, gate_up, expert_ids, None)

        def each(function, *lists):
            return [function(*operands) for operands in zip(*lists, strict=True)]

        def time_each(function, *lists) -> float:
            return self.time(functools.partial(each, function), *lists) / NUM_LAYERS

        plans = each(jax.jit(dispatch), gate_up, expert_ids)
        xs = [x] * NUM_LAYERS
        inner = each(jax.jit(triton.grouped_swiglu), xs, gate_up, plans)
        y = each(jax.jit(triton.grouped_matmul), inner, down, plans)
        return {
            "dispatch": time_each(dispatch, gate_up, expert_ids),
            "grouped_swiglu": time_each(triton.grouped_swiglu, xs, gate_up, plans),
            "grouped_matmul": time_each(triton.grouped_matmul, inner, down, plans),
            "combine": time_each(combine, y, weights, plans),
        }

    def tune(self, num_tokens: int):
        """Times of both products, by blocks."""
        x = jax.random.normal(jax.random.key(1), (num_tokens, self.config.hidden_size), self.dtype)
        _, expert_ids = jax.jit(self.route)(self.layers[0], x)
        gate_up, down = operands_of(self.block)
        for tile_size, blocks in itertools.product(triton.BLOCKS, TUNE):
            try:
                yield (
                    tile_size,
                    blocks,
                    *self.products(x, gate_up, down, expert_ids, tile_size, blocks),
                )
            except Exception as error:  # too much shared memory, for one
                yield tile_size, blocks, str(error)[:80], None

    def products(self, x, gate_up, down, expert_ids, tile_size, blocks) -> tuple[float, float]:
        dispatch = jax.jit(triton.make_dispatch, static_argnums=(2, 3))(
            expert_ids, None, len(gate_up), tile_size
        )

        def first(x, gate_up, dispatch):
            return triton.grouped_swiglu(x, gate_up, dispatch, blocks=blocks)

        def second(inner, down, dispatch):
            return triton.grouped_matmul(inner, down, dispatch, blocks=blocks)

        inner = jax.jit(first)(x, gate_up, dispatch)
        return self.time(first, x, gate_up, dispatch), self.time(second, inner, down, dispatch)

    def floor(self, num_tokens: int, expert_ids: jax.Array) -> float:
        sizes = self.config.moe
        chosen = len(np.unique(expert_ids))
        matrix, shared = 3 * self.config.hidden_size, sizes.shared_intermediate_size
        num_bytes = 2 * matrix * (chosen * sizes.intermediate_size + shared)
        inner = sizes.routing.top_k * sizes.intermediate_size + shared
        operations = 2 * num_tokens * matrix * inner
        return max(num_bytes / MEMORY_BYTES_PER_S, operations / OPERATIONS_PER_S) * 1e6

    def error(self, x: jax.Array) -> float:
        """Of the first 64 tokens, for the choices that the layer makes in bfloat16."""
        x = x[:64]
        got = jax.jit(self.experts)(self.block, x)
        weights, expert_ids = jax.jit(self.route)(self.layers[0], x)
        gate_up, down = (array.astype(jnp.float32) for array in operands_of(self.block))
        x = x.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            plan = moe.plan(x, gate_up, expert_ids, implementation="reference")
            want = moe.experts(x, gate_up, down, weights, plan)
        return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def operands_of(block: SparseMoeBlock) -> tuple[jax.Array, jax.Array]:
    return block.experts.gate_up_proj.weight[...], block.experts.down_proj.weight[...]


def uses_triton() -> bool:
    return "triton" in PREFERENCE.get(jax.default_backend(), ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen1.5-moe")
    parser.add_argument("--tokens", default="1,8,64,256,1024,4096", help="batch sizes")
    parser.add_argument("--repeats", type=int, default=10, help="calls in a row")
    parser.add_argument("--tune", action="store_true", help="time other blocks instead")
    options = parser.parse_args()
    bench = Bench(options.model, options.repeats)
    for num_tokens in map(int, options.tokens.split(",")):
        base = {"model": options.model, "device": jax.devices()[0].device_kind, "T": num_tokens}
        if options.tune:
            for tile_size, blocks, first, second in bench.tune(num_tokens):
                line = {"tile_size": tile_size, "blocks": str(blocks)}
                print(json.dumps(base | line | {"us": [first, second]}), flush=True)
            continue
        line = {key: float(f"{value:.4g}") for key, value in bench.measure(num_tokens).items()}
        print(json.dumps(base | line), flush=True)


if __name__ == "__main__":
    main()

"""The experts of real models, compiled for every kind of TPU by its own compiler, without one.

Says that the compiler takes the kernels, what it plans to compute and how much memory; not that a
TPU gives what the interpreter gives.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels import moe

pytestmark = pytest.mark.tpu
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else a lock file refuses a second process

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
MODELS = {  # E, D, F, k
    "Qwen1.5-MoE-A2.7B": (60, 2048, 1408, 4),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "Mixtral-8x7B": (8, 4096, 14336, 2),
}


@pytest.fixture(autouse=True, scope="module")
def no_kept_programs():
    """What is compiled for a TPU cannot be loaded where there is none."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A model's experts for so many tokens, compiled for a chip."""

    num_places: int  # that the plan has for pairs of a token and an expert
    products: float  # flops in the kernels' grids, as traced; unused tiles too
    estimate: float  # flops, by XLA's cost analysis
    temporary: int  # bytes
    text: str
    seconds: float


def run(x, gate_up, down, weights, expert_ids, is_live):
    plan = moe.plan(x, gate_up, expert_ids, is_live, implementation="mosaic-tpu")
    return moe.experts(x, gate_up, down, weights, plan), plan.dispatch.pair


def compile_layer(chip, shape, num_tokens, dtype=jnp.bfloat16) -> Layer:
    num_experts, hidden, inner, choices = shape
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip], chips_per_host_bounds=(1, 1, 1)
    ).devices[0]
    shapes = [
        ((num_tokens, hidden), dtype),
        ((num_experts, 2, inner, hidden), dtype),
        ((num_experts, hidden, inner), dtype),
        ((num_tokens, choices), jnp.float32),
        ((num_tokens, choices), jnp.int32),
        ((num_tokens,), jnp.bool_),
    ]
    sharded = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    kind = Mesh(np.array([device]), ("x",)).abstract_mesh.abstract_device
    start = time.perf_counter()
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(run).trace(*(sharded(*s) for s in shapes))
        program = traced.lower().compile()
    return Layer(
        num_places=math.prod(traced.out_info[1].shape),
        products=product_flops(traced.jaxpr.jaxpr),
        estimate=program.cost_analysis()["flops"],
        temporary=program.memory_analysis().temp_size_in_bytes,
        text=program.as_text(),
        seconds=time.perf_counter() - start,
    )


def product_flops(jaxpr) -> int:
    """Of all matrix products, those of a kernel times the steps of its grid."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (depth_axes, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in depth_axes)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "pallas_call":
            steps = math.prod(equation.params["grid_mapping"].grid)
            total += steps * product_flops(equation.params["jaxpr"])
        else:
            total += sum(product_flops(inner) for inner in inner_jaxprs(equation.params))
    return total


def inner_jaxprs(params) -> Iterator:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def check(layer, shape, num_tokens, dtype=jnp.bfloat16):
    num_experts, hidden, inner, choices = shape
    of_row, itemsize = 6 * hidden * inner, jnp.dtype(dtype).itemsize
    ideal, dense = layer.num_places * of_row, num_experts * num_tokens * of_row
    rows = layer.num_places * (2 * hidden + inner) * itemsize
    chosen = num_tokens * choices * hidden * (itemsize + 4)
    print(
        f"{layer.seconds:.1f} s, {layer.products:.2e} flops in the kernels, {layer.estimate:.2e} "
        f"in all, ideal {ideal:.2e}, all experts for all tokens {dense:.2e}, temporary "
        f"{layer.temporary / 2**20:.1f} MiB, weights {num_experts * of_row * itemsize / 2**21:.0f}"
    )
    for flops in (layer.products, layer.estimate):
        assert ideal <= flops < 1.5 * ideal
        assert num_tokens < 64 or flops < dense, "a tile has 16 rows: few tokens fill no expert's"
    assert layer.temporary < rows + chosen + (16 << 20), "weights are copied"
    assert layer.text.count('custom_call_target="tpu_custom_call"') == 2
    for word in (" dot(", " convolution(", " sort(", " while("):
        assert word not in layer.text


@pytest.mark.parametrize("num_tokens", [8, 64, 512])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_the_compiler_takes_the_experts_of(chip, model, num_tokens):
    check(compile_layer(chip, MODELS[model], num_tokens), MODELS[model], num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 4096])
@pytest.mark.parametrize("chip", CHIPS)
def test_few_and_many_tokens(chip, num_tokens):
    shape = MODELS["Qwen1.5-MoE-A2.7B"]
    check(compile_layer(chip, shape, num_tokens), shape, num_tokens)


@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chip", CHIPS)
def test_sizes_that_no_register_has(chip, dtype, precision):
    for shape in ((6, 33, 7, 2), (6, 176, 1000, 3)):
        with jax.default_matmul_precision(precision):
            layer = compile_layer(chip, shape, 20, dtype)
        assert layer.text.count('custom_call_target="tpu_custom_call"') == 2

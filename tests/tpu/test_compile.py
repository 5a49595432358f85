"""The experts of real models, compiled for every kind of TPU by its own compiler, without one.

Says that the compiler takes the kernels, what it plans to compute and how much memory, not that a
TPU gives what the interpreter gives.
"""

import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels import moe
from pallas_kernels.moe import mosaic_tpu

pytestmark = pytest.mark.tpu
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else a second process is refused by a lock file

CHIPS = {"v5e": "1x1", "v5p": "1x1x1", "v6e": "1x1", "tpu7x": "1x1x1"}
SHAPES = {  # E, D, F, k
    "Qwen1.5-MoE-A2.7B": (60, 2048, 1408, 4),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "Mixtral-8x7B": (8, 4096, 14336, 2),
}


@pytest.fixture(autouse=True)
def no_kept_programs():
    """A program for a TPU cannot be loaded where there is none."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def run(x, gate_up, down, weights, expert_ids, is_live):
    plan = moe.plan(x, gate_up, expert_ids, is_live, implementation="mosaic-tpu")
    return moe.experts(x, gate_up, down, weights, plan)


class Compiled:
    """A layer of experts for `num_tokens` tokens, compiled for a chip."""

    def __init__(self, chip, num_tokens, shape, dtype=jnp.bfloat16):
        num_experts, hidden, inner, choices = shape
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip}:{CHIPS[chip]}",
            chips_per_host_bounds=(1, 1, 1),
        )
        device = topology.devices[0]
        kind = Mesh(np.array([device]), ("x",)).abstract_mesh.abstract_device
        arguments = [
            jax.ShapeDtypeStruct(size, kind_of_number, sharding=SingleDeviceSharding(device))
            for size, kind_of_number in (
                ((num_tokens, hidden), dtype),
                ((num_experts, 2, inner, hidden), dtype),
                ((num_experts, hidden, inner), dtype),
                ((num_tokens, choices), jnp.float32),
                ((num_tokens, choices), jnp.int32),
                ((num_tokens,), jnp.bool_),
            )
        ]
        start = time.perf_counter()
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
            traced = jax.jit(run).trace(*arguments)
            self.program = traced.lower().compile()
        self.seconds = time.perf_counter() - start
        self.text = self.program.as_text()
        self.calls = [e for e in traced.jaxpr.eqns]
        self.traced = traced
        self.weight_bytes = math.prod((num_experts, 3, hidden, inner)) * jnp.dtype(dtype).itemsize


if __name__ == "__main__":
    import sys
    for chip in (sys.argv[1:] or CHIPS):
        for name, shape in SHAPES.items():
            for t in (8, 64, 512):
                try:
                    c = Compiled(chip, t, shape)
                    ma = c.program.memory_analysis(); ca = c.program.cost_analysis()
                    print(chip, name, t, f"{c.seconds:.1f}s temp {ma.temp_size_in_bytes/2**20:.1f} MiB peak {ma.peak_memory_in_bytes/2**20:.0f} flops {ca['flops']:.3g} weights {c.weight_bytes/2**20:.0f}MiB", c.text.count("tpu_custom_call"), "conv", c.text.count("convolution("), flush=True)
                except Exception as e:
                    print(chip, name, t, "FAIL", type(e).__name__, str(e)[:600], flush=True)

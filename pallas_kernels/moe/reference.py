"""Experts in plain jnp: the meaning of the operation, and what runs on a CPU.

A tile of one expert's tokens is taken at a time, so that only chosen experts are computed and the
cost follows the tokens that are really there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.moe.dispatch import Dispatch, combine, make_dispatch

MOST_ROWS = 64  # of a tile
FEW_ROWS = 16  # as few tokens are one tile for each of their experts: its weights are read once


def plan(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    expert_ids: Int32[Array, "T k"],
    is_live: Bool[Array, " T"] | None,
) -> Dispatch:
    num_tokens, choices = expert_ids.shape
    num_experts = len(gate_up)
    rows = max(min(num_tokens, FEW_ROWS), min(-(-num_tokens * choices // num_experts), MOST_ROWS))
    return make_dispatch(expert_ids, is_live, num_experts, tile_size=1 << (rows - 1).bit_length())


def experts(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    weights: Float[Array, "T k"],
    dispatch: Dispatch,
) -> Float[Array, "T D"]:
    num_tiles, tile_size = dispatch.pair.shape

    def compute(tile: jax.Array, y: jax.Array) -> jax.Array:
        expert, token = dispatch.expert[tile], dispatch.pair[tile] // weights.shape[1]
        rows = x.at[token].get(mode="fill", fill_value=0)
        return y.at[tile].set(swiglu(rows, gate_up[expert], down[expert]))

    y = jnp.zeros((num_tiles, tile_size, x.shape[1]), jnp.float32)
    y = jax.lax.fori_loop(0, dispatch.num_tiles, compute, y)
    return combine(y.reshape(-1, x.shape[1]), weights, dispatch).astype(x.dtype)


def swiglu(
    x: Float[Array, "n D"], gate_up: Float[Array, "2 F D"], down: Float[Array, "D F"]
) -> Float[Array, "n D"]:
    """One expert (https://arxiv.org/abs/2002.05202): sums in float32, and so is the result."""
    gate, up = (jnp.einsum("nd,fd->nf", x, w, preferred_element_type=jnp.float32) for w in gate_up)
    inner = (jax.nn.silu(gate) * up).astype(x.dtype)
    return jnp.einsum("nf,df->nd", inner, down, preferred_element_type=jnp.float32)

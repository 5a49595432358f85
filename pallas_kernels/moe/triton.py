"""Experts on CUDA GPUs, in Pallas on Triton.

Deprecated by JAX, but the only Pallas backend whose calls are captured in CUDA graphs today; delete
when JAX removes it. Two grouped matrix products, each one program for every (block of features,
tile of one expert's tokens): the first gathers its rows and ends in SwiGLU, the second reads what
the first has laid out. Neighbouring programs share a tile's rows, which stay in the L2 cache.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.moe.dispatch import Dispatch, combine, make_dispatch

LOG2E = math.log2(math.e)
SMALLEST_BLOCK = 16  # of any side of a product


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut; the tiles of a dispatch are its third size."""

    features: int  # of the result, for each program
    depth: int  # of the sum, for each turn of the loop
    num_warps: int
    num_stages: int


# By tile size: the best of those tried on an H200 with 60 experts of 2048 x 1408 (moe.py --tune).
BLOCKS = {
    16: Blocks(features=64, depth=128, num_warps=4, num_stages=3),
    32: Blocks(features=128, depth=64, num_warps=8, num_stages=3),
    64: Blocks(features=128, depth=64, num_warps=8, num_stages=3),
    128: Blocks(features=128, depth=64, num_warps=8, num_stages=3),
}
SWIGLU_BLOCKS = BLOCKS | {
    64: Blocks(features=128, depth=64, num_warps=8, num_stages=4),
    128: Blocks(features=128, depth=64, num_warps=8, num_stages=4),
}


def plan(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    expert_ids: Int32[Array, "T k"],
    is_live: Bool[Array, " T"] | None,
) -> Dispatch:
    num_experts, _, inner, hidden = gate_up.shape
    if hidden % SMALLEST_BLOCK or inner % SMALLEST_BLOCK:
        raise NotImplementedError(f"sizes {hidden} and {inner} are no multiples of 16")
    if x.dtype != gate_up.dtype:
        raise NotImplementedError(f"tokens in {x.dtype}, experts in {gate_up.dtype}")
    return make_dispatch(expert_ids, is_live, num_experts, _tile_size(expert_ids.size, num_experts))


def _tile_size(num_pairs: int, num_experts: int) -> int:
    """About twice what an expert gets on average: most fit in one tile, so that its weights are
    read once."""
    average = num_pairs / num_experts
    return 16 if average <= 8 else 32 if average <= 24 else 64 if average <= 48 else 128


def experts(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    weights: Float[Array, "T k"],
    dispatch: Dispatch,
    *,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    inner = grouped_swiglu(x, gate_up, dispatch, interpret=interpret)
    y = grouped_matmul(inner, down, dispatch, interpret=interpret)
    return combine(y, weights, dispatch).astype(x.dtype)


def grouped_swiglu(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    dispatch: Dispatch,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> Float[Array, "places F"]:
    """silu(gate @ x) * (up @ x) of each place's token and expert; places of tiles that are not
    used are not written."""
    num_experts, _, inner, hidden = gate_up.shape
    kernel = functools.partial(_swiglu_kernel, choices=dispatch.place.shape[1])
    arguments = x, gate_up.reshape(num_experts * 2 * inner, hidden), dispatch.pair
    blocks = blocks or SWIGLU_BLOCKS[dispatch.pair.shape[1]]
    call = functools.partial(_call, kernel, arguments, dispatch, blocks=blocks, interpret=interpret)
    return call(num_features=inner, depth=hidden, dtype=x.dtype, name="grouped_swiglu")


def grouped_matmul(
    inner: Float[Array, "places F"],
    down: Float[Array, "E D F"],
    dispatch: Dispatch,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> Float[Array, "places D"]:
    """down @ inner of each place's expert; places of tiles that are not used are not written."""
    num_experts, hidden, depth = down.shape
    arguments = inner, down.reshape(num_experts * hidden, depth)
    kernel = _matmul_kernel
    blocks = blocks or BLOCKS[dispatch.pair.shape[1]]
    call = functools.partial(_call, kernel, arguments, dispatch, blocks=blocks, interpret=interpret)
    return call(num_features=hidden, depth=depth, dtype=inner.dtype, name="grouped_matmul")


def _call(
    kernel, arguments, dispatch, *, blocks, interpret, num_features, depth, dtype, name
) -> jax.Array:
    num_tiles, tile_size = dispatch.pair.shape
    features = _largest_block(num_features, blocks.features)
    arguments = (*arguments, dispatch.expert, dispatch.num_tiles.reshape(1))

    def whole(shape):
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    out = jax.ShapeDtypeStruct((num_tiles * tile_size, num_features), dtype)
    return pl.pallas_call(
        functools.partial(
            kernel,
            tile_size=tile_size,
            num_features=num_features,
            features=features,
            block_depth=_largest_block(depth, blocks.depth),
        ),
        grid=(num_features // features, num_tiles),
        in_specs=[whole(argument.shape) for argument in arguments],
        out_specs=whole(out.shape),
        out_shape=out,
        compiler_params=plt.CompilerParams(
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
        ),
        interpret=interpret,
        name=name,
    )(*arguments)


def _largest_block(size: int, most: int) -> int:
    """The largest power of two that divides `size`, `most` at most."""
    return min(most, size & -size)


def _swiglu_kernel(
    x_ref,  # [T, D]
    gate_up_ref,  # [E * 2 * F, D]
    pair_ref,  # [tiles, tile_size]
    expert_ref,  # [tiles]
    num_tiles_ref,  # [1]
    out_ref,  # [tiles * tile_size, F]
    *,
    choices,
    tile_size,
    num_features,
    features,
    block_depth,
):
    block, tile = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < num_tiles_ref[0])
    def _():
        num_tokens, depth = x_ref.shape
        # A place without a pair computes the last token: nobody takes what it gives.
        token = jnp.minimum(lax.div(pair_ref[tile, :], choices), num_tokens - 1)
        gate_line = expert_ref[tile] * (2 * num_features) + block * features

        def body(i, sums):
            columns = pl.ds(i * block_depth, block_depth)
            rows = x_ref[token, columns]
            gate = gate_up_ref[pl.ds(gate_line, features), columns]
            up = gate_up_ref[pl.ds(gate_line + num_features, features), columns]
            return sums[0] + plt.dot(rows, gate.T), sums[1] + plt.dot(rows, up.T)

        zeros = jnp.zeros((tile_size, features), jnp.float32)
        gate, up = lax.fori_loop(0, depth // block_depth, body, (zeros, zeros))
        inner = gate / (1 + jnp.exp2(-gate * LOG2E)) * up
        place = pl.ds(tile * tile_size, tile_size)
        out_ref[place, pl.ds(block * features, features)] = inner.astype(out_ref.dtype)


def _matmul_kernel(
    inner_ref,  # [tiles * tile_size, F]
    down_ref,  # [E * D, F]
    expert_ref,  # [tiles]
    num_tiles_ref,  # [1]
    out_ref,  # [tiles * tile_size, D]
    *,
    tile_size,
    num_features,
    features,
    block_depth,
):
    block, tile = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < num_tiles_ref[0])
    def _():
        place = pl.ds(tile * tile_size, tile_size)
        line = expert_ref[tile] * num_features + block * features

        def body(i, total):
            columns = pl.ds(i * block_depth, block_depth)
            weights = down_ref[pl.ds(line, features), columns]
            return total + plt.dot(inner_ref[place, columns], weights.T)

        zeros = jnp.zeros((tile_size, features), jnp.float32)
        total = lax.fori_loop(0, inner_ref.shape[1] // block_depth, body, zeros)
        out_ref[place, pl.ds(block * features, features)] = total.astype(out_ref.dtype)

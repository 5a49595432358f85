"""Experts on TPUs, in Pallas on Mosaic.

Two grouped matrix products, each a grid of (block of features, tile of one expert's tokens) with
the sum in one piece. Tiles are the inner dimension and an expert's tiles are neighbours, so that
its block of weights stays where it is for all of them: no weight is read twice, however many tokens
there are, and none of an expert without any. What is read again, for each block of features, is
the tiles' rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.moe.dispatch import Dispatch, make_dispatch

LANES = 128
SMALLEST_VMEM = 16 << 20  # bytes of a core, among all TPUs
BLOCK_BYTES = 4 << 20  # of weights: some microseconds' reading, beside which a grid step is nothing


def plan(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    expert_ids: Int32[Array, "T k"],
    is_live: Bool[Array, " T"] | None,
) -> Dispatch:
    num_experts, _, inner, hidden = gate_up.shape
    if gate_up.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"experts in {gate_up.dtype}, not in float32 or bfloat16")
    if min(hidden, inner) == 1:
        raise NotImplementedError("sums of one product, which Mosaic fails at in bfloat16")
    if x.dtype != gate_up.dtype:
        raise NotImplementedError(f"tokens in {x.dtype}, experts in {gate_up.dtype}")
    tile_size = _tile_size(expert_ids.size, num_experts)
    for parts, num_features, depth in ((2, inner, hidden), (1, hidden, inner)):
        block_features(parts, num_features, depth, tile_size, x.dtype)
    return make_dispatch(expert_ids, is_live, num_experts, tile_size)


def _tile_size(num_pairs: int, num_experts: int) -> int:
    """About twice what an expert gets on average. Not for the weights' sake, which are read once
    in any case: a tile costs a grid step and a turn of the weights through the matrix unit, and
    its empty places cost their share of both. 16 rows are the least that bfloat16 is packed in."""
    average = num_pairs / num_experts
    return next((size for size in (16, 32, 64, 128) if 2 * average <= size), 256)


def block_features(
    parts: int, num_features: int, depth: int, tile_size: int, dtype: jax.typing.DTypeLike
) -> int:
    """How many features of a product are computed at a time.

    BLOCK_BYTES of weights or four times a tile's rows, whichever is more: rows, which each block
    reads again, are then a quarter of the weights at most. No more than half of the features, since
    a v4 and a v5p share blocks among two cores. Fewer where VMEM lacks.

    Raises:
      NotImplementedError: VMEM is too small for blocks of 128 features.
    """
    most, limit = _round_up(num_features, LANES), vmem_capacity() // 2
    needs = functools.partial(
        _vmem_bytes, parts=parts, depth=depth, tile_size=tile_size, dtype=dtype
    )
    of_feature = parts * depth * jnp.dtype(dtype).itemsize
    features = max(BLOCK_BYTES // of_feature, 4 * tile_size)
    features = min(_round_up(features, LANES), _round_up(most // 2, LANES))
    while features > LANES and needs(features) > limit:
        features -= LANES
    if needs(features) > limit:
        raise NotImplementedError(
            f"blocks of {features} features, sums of {depth} in {jnp.dtype(dtype)} and tiles of "
            f"{tile_size} need {needs(features)} bytes of VMEM, of {limit}"
        )
    if features >= num_features:
        return num_features
    num_blocks = -(-num_features // features)
    return _round_up(-(-num_features // num_blocks), LANES)  # all about the same


def vmem_capacity() -> int:
    """Bytes of a core: v5e and v6e have 128 MiB, v5p and 7x 64, older ones and the interpreter 16.

    Blocks get half of it. The compiler is given three quarters: it takes some for itself, the more
    the more it may, and fails at blocks that nearly fill what it is given.
    """
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else SMALLEST_VMEM


def _vmem_bytes(
    features: int, *, parts: int, depth: int, tile_size: int, dtype: jax.typing.DTypeLike
) -> int:
    """Two of each block, one in use while the other travels, and the products in float32."""
    depth, itemsize = _round_up(depth, LANES), jnp.dtype(dtype).itemsize
    blocks = tile_size * depth + parts * features * depth + tile_size * features
    return 2 * blocks * itemsize + (parts + 1) * tile_size * features * 4


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def experts(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    weights: Float[Array, "T k"],
    dispatch: Dispatch,
    *,
    interpret: Any = False,
) -> Float[Array, "T D"]:
    """`interpret` is what `pallas_call` takes."""
    # A place without a pair gets the last token: nobody takes what it gives.
    rows = jnp.take(x, dispatch.pair.reshape(-1) // weights.shape[1], axis=0, mode="clip")
    inner = grouped(_swiglu, rows, gate_up, dispatch, name="grouped_swiglu", interpret=interpret)
    y = grouped(_plain, inner, down[:, None], dispatch, name="grouped_matmul", interpret=interpret)
    return _combine(y, weights, dispatch).astype(x.dtype)


def _combine(
    y: Float[Array, "places D"], weights: Float[Array, "T k"], dispatch: Dispatch
) -> Float[Array, "T D"]:
    """What `dispatch.combine` means, with the choices first.

    [T, k, D] would be padded in k: a fifth more is moved, and v6e's compiler takes 8 s instead of
    0.3 s (512 tokens of Qwen1.5-MoE).
    """
    chosen = y.at[dispatch.place.T].get(mode="fill", fill_value=0).astype(jnp.float32)
    return (chosen * weights.T[..., None].astype(jnp.float32)).sum(axis=0)


def _swiglu(gate: Float[Array, "n features"], up: Float[Array, "n features"]) -> jax.Array:
    return jax.nn.silu(gate) * up


def _plain(product: Float[Array, "n features"]) -> jax.Array:
    return product


def grouped(
    finish: Callable[..., jax.Array],
    rows: Float[Array, "places depth"],
    weights: Float[Array, "E parts features depth"],
    dispatch: Dispatch,
    *,
    name: str,
    interpret: Any = False,
) -> Float[Array, "places features"]:
    """`finish` of the products, in float32, of each place's row with the parts of its expert.

    Places of tiles that are not used are not written.
    """
    (num_tiles, tile_size), (_, parts, num_features, depth) = dispatch.pair.shape, weights.shape
    features = block_features(parts, num_features, depth, tile_size, rows.dtype)
    num_blocks = -(-num_features // features)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(num_blocks, num_tiles),
        in_specs=[
            pl.BlockSpec((tile_size, depth), rows_block),
            pl.BlockSpec((1, parts, features, depth), weights_block),
        ],
        out_specs=pl.BlockSpec((tile_size, features), out_block),
    )
    out = jax.ShapeDtypeStruct((len(rows), num_features), rows.dtype)
    weights_read = min(num_tiles, len(weights)) * weights[0].size
    cost = pl.CostEstimate(
        flops=2 * len(rows) * weights[0].size,
        bytes_accessed=rows.dtype.itemsize * (num_blocks * rows.size + weights_read + out.size),
        transcendentals=out.size * (parts - 1),
    )
    return pl.pallas_call(
        functools.partial(_kernel, finish),
        grid_spec=grid_spec,
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_capacity() * 3 // 4,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(dispatch.expert, dispatch.num_tiles.reshape(1), rows, weights)


# Which block each step of the grid works on. A tile that is not used stays at the last one that is,
# whose blocks are there: nothing is read for it, and nothing written.


def _used(tile, num_tiles):
    return jnp.minimum(tile, jnp.maximum(num_tiles[0] - 1, 0))


def rows_block(block, tile, expert, num_tiles):
    return _used(tile, num_tiles), 0


def weights_block(block, tile, expert, num_tiles):
    return expert[_used(tile, num_tiles)], 0, block, 0


def out_block(block, tile, expert, num_tiles):
    return _used(tile, num_tiles), block


def _kernel(
    finish,
    expert_ref,  # [tiles]
    num_tiles_ref,  # [1]
    rows_ref,  # [tile_size, depth]
    weights_ref,  # [1, parts, features, depth]
    out_ref,  # [tile_size, features]
):
    @pl.when(pl.program_id(1) < num_tiles_ref[0])
    def _():
        rows = rows_ref[...]
        # A precision that is asked of all products is float32's: Mosaic refuses it for bfloat16.
        precision = None if rows.dtype == jnp.float32 else lax.Precision.DEFAULT
        products = (
            lax.dot_general(
                rows,
                weights_ref[0, part],
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            for part in range(weights_ref.shape[1])
        )
        out_ref[...] = finish(*products).astype(out_ref.dtype)

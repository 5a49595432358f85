"""Which expert computes what: the tokens' choices laid out by expert, and the way back.

Histograms and prefix sums alone. Not a sort, which is many kernels on a GPU, and no loop, which
splits the CUDA graph.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

BLOCK = 128  # pairs that are ranked against each other: the cost of ranking N is N * (BLOCK + E)


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The `T * k` pairs of a live token and an expert that it takes, laid out expert by expert.

    Pair `t * k + i` is token `t` with the `i`-th of its experts. Each expert's pairs fill whole
    tiles of `tile_size` places, in the order of the tokens. The first `num_tiles` tiles are used;
    what an expert leaves of its last one, and the tiles after them, hold no pair.
    """

    group_sizes: Int32[Array, " E"]  # pairs of each expert
    num_tiles: Int32[Array, ""]
    expert: Int32[Array, " tiles"]  # of each tile; any for those that are not used
    pair: Int32[Array, "tiles tile_size"]  # at each place, T * k for none
    place: Int32[Array, "T k"]  # of each pair, tiles * tile_size for those of padding tokens


def make_dispatch(
    expert_ids: Int32[Array, "T k"],
    is_live: Bool[Array, " T"] | None,
    num_experts: int,
    tile_size: int,
) -> Dispatch:
    num_pairs, choices = expert_ids.size, expert_ids.shape[1]
    expert = expert_ids.reshape(-1)
    if is_live is not None:  # no expert is number E, so that these pairs are counted nowhere
        expert = jnp.where(jnp.repeat(is_live, choices), expert, num_experts)
    group_sizes, rank = _count(expert, num_experts)
    tiles_of_expert = (group_sizes + tile_size - 1) // tile_size
    tile_end = jnp.cumsum(tiles_of_expert)
    most_tiles = (num_pairs + min(num_pairs, num_experts) * (tile_size - 1)) // tile_size

    first_place = jnp.append((tile_end - tiles_of_expert) * tile_size, most_tiles * tile_size)
    place = jnp.where(expert < num_experts, first_place[expert] + rank, first_place[-1])
    pair = jnp.full(most_tiles * tile_size, num_pairs, jnp.int32)
    pair = pair.at[place].set(jnp.arange(num_pairs, dtype=jnp.int32), mode="drop")
    tile = jnp.arange(most_tiles, dtype=jnp.int32)
    # Not jnp.searchsorted, which is a loop.
    owner = (tile_end <= tile[:, None]).sum(axis=1, dtype=jnp.int32)
    return Dispatch(
        group_sizes=group_sizes,
        num_tiles=tile_end[-1],
        expert=jnp.minimum(owner, num_experts - 1),
        pair=pair.reshape(most_tiles, tile_size),
        place=place.reshape(expert_ids.shape),
    )


def combine(
    y: Float[Array, "places D"], weights: Float[Array, "T k"], dispatch: Dispatch
) -> Float[Array, "T D"]:
    """Each token's weighted sum, in float32, of what its experts gave; padding tokens get zeros."""
    chosen = y.at[dispatch.place].get(mode="fill", fill_value=0).astype(jnp.float32)
    return (chosen * weights[..., None].astype(jnp.float32)).sum(axis=1)


def _count(
    expert: Int32[Array, " N"], num_experts: int
) -> tuple[Int32[Array, " E"], Int32[Array, " N"]]:
    """How many pairs each expert has, and how many of its pairs precede each pair.

    Within a block by comparing all with all, between blocks by running sums of their histograms:
    both are fused, and no one-hot matrix of all pairs is ever written.
    """
    num_pairs = len(expert)
    padding = -num_pairs % BLOCK if num_pairs > BLOCK else 0
    blocks = jnp.pad(expert, (0, padding), constant_values=num_experts)
    blocks = blocks.reshape(-1, min(BLOCK, num_pairs + padding))
    is_same = blocks[:, :, None] == blocks[:, None, :]
    position = jnp.arange(blocks.shape[1])
    rank = (is_same & (position[None] < position[:, None])).sum(axis=2, dtype=jnp.int32)
    counts = (blocks[:, :, None] == jnp.arange(num_experts)).sum(axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(counts, axis=0)
    before = jnp.pad(ends - counts, ((0, 0), (0, 1)))  # a column for what no expert has
    rank += jnp.take_along_axis(before, blocks, axis=1)
    return ends[-1], rank.reshape(-1)[:num_pairs]

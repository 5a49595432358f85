"""What one step attends with: a packed batch of rows, and its division into tiles of queries."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """Rows of new tokens, packed one after the other: `T` tokens of `B` rows.

    Row `b` owns the tokens `query_start_loc[b] : query_start_loc[b + 1]`, which are the last of
    its `seq_lens[b]` tokens, and finds them in the pages `page_table[b]` of every layer. A padding
    row has no tokens; tokens after the last row's are padding.
    """

    page_table: Int32[Array, "B M"]
    seq_lens: Int32[Array, " B"]  # tokens in the cache after this step
    query_start_loc: Int32[Array, " B+1"]


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """A batch cut into tiles of `tile_size` consecutive queries of one row.

    A tile meets `num_blocks` blocks of `block_size` keys: those up to its last query's position,
    or all of its row.
    The blocks of all tiles, laid end to end, are the work list; `block_end` is its running count.
    Token `t` is query `place[t]` of all tiles' queries laid end to end.
    """

    row: Int32[Array, " tiles"]
    query: Int32[Array, "tiles tile_size"]  # index of the token, T for none
    position: Int32[Array, "tiles tile_size"]  # in the row, -1 for none
    place: Int32[Array, " T"]  # tiles * tile_size for none
    num_blocks: Int32[Array, " tiles"]
    block_end: Int32[Array, " tiles"]
    batch: RaggedBatch
    block_size: int = dataclasses.field(metadata={"static": True})


def make_tiles(
    batch: RaggedBatch,
    num_tokens: int,
    tile_size: int,
    block_size: int,
    *,
    is_causal: bool = True,
) -> Tiles:
    """Cuts `batch`, whose packed tokens number `num_tokens` with padding, into tiles."""
    starts, ends = batch.query_start_loc[:-1], batch.query_start_loc[1:]
    query_lens = ends - starts
    tiles_of_row = _cdiv(query_lens, tile_size)
    tile_end = jnp.cumsum(tiles_of_row)
    most_tiles = num_tokens // tile_size + (len(starts) if tile_size > 1 else 0)

    tile = jnp.arange(most_tiles, dtype=jnp.int32)
    row = owner(tile_end, tile)
    first_tile = tile_end - tiles_of_row
    first = (tile - first_tile[row]) * tile_size  # of the tile's queries, in its row
    offset = first[:, None] + jnp.arange(tile_size, dtype=jnp.int32)
    live = (offset < query_lens[row][:, None]) & (tile < tile_end[-1])[:, None]

    context = batch.seq_lens - query_lens
    position = jnp.where(live, context[row][:, None] + offset, -1)
    num_keys = position.max(axis=1) + 1
    if not is_causal:
        num_keys = jnp.where(num_keys > 0, batch.seq_lens[row], 0)
    num_blocks = _cdiv(num_keys, block_size)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row_of_token = owner(ends, token)
    place = first_tile[row_of_token] * tile_size + token - starts[row_of_token]
    return Tiles(
        row=row,
        query=jnp.where(live, starts[row][:, None] + offset, num_tokens),
        position=position,
        place=jnp.where(token < ends[-1], place, most_tiles * tile_size),
        num_blocks=num_blocks,
        block_end=jnp.cumsum(num_blocks),
        batch=batch,
        block_size=block_size,
    )


def owner(ends: Int32[Array, " lists"], item: Int32[Array, " items"]) -> Int32[Array, " items"]:
    """Which list holds each item, where lists that end at `ends` are laid end to end; the last for
    an item beyond."""
    # Not jnp.searchsorted: it becomes a loop, slow on a CPU, and on a GPU it splits the CUDA graph.
    lists = (ends <= item[:, None]).sum(axis=1, dtype=jnp.int32)
    return jnp.minimum(lists, len(ends) - 1)


def _cdiv(a: jax.Array, b: int) -> jax.Array:
    return (a + b - 1) // b

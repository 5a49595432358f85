"""Paged attention whose result for a token is the same to the bit in every batch.

Each token attends as if it were decoded alone: the blocks of its row's keys one after the other,
beginning with the first, in the body of a loop whose shapes are fixed. So nothing counts but the
query, the keys and their number: not the tokens beside it, nor how many are new, nor the pages.
Costs each token a pass over all its keys: a prompt's tokens share none of it.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.kv_cache import KVCache
from pallas_kernels.attention.ragged import RaggedBatch, owner
from pallas_kernels.attention.reference import NEVER
from pallas_kernels.fixed_tiles import TILE, in_tiles

BLOCK = 64  # keys
QUERIES = 4  # at a time: so few that their keys stay in a CPU's L2 cache


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """A batch as single tokens."""

    row: Int32[Array, " T"]
    num_keys: Int32[Array, " T"]  # that it sees, its own among them; 0 for padding
    page_table: Int32[Array, "B M"]

    def cut(self, start: Int32[Array, ""]) -> "Tokens":
        """The tile of tokens that begins at `start`."""
        token = start + jnp.arange(TILE, dtype=jnp.int32)
        row, num_keys = (
            x.at[token].get(mode="fill", fill_value=0) for x in (self.row, self.num_keys)
        )
        return Tokens(row, num_keys, self.page_table)


def plan(batch: RaggedBatch, cache: KVCache, num_tokens: int) -> Tokens:
    """Once per step."""
    ends = batch.query_start_loc[1:]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = owner(ends, token)
    num_keys = batch.seq_lens[row] - (ends[row] - 1 - token)
    return Tokens(row, jnp.where(token < ends[-1], num_keys, 0), batch.page_table)


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KVCache,
    layer: Int32[Array, ""],
    tokens: Tokens,
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "T N H"]:
    def attend(q: jax.Array, row: jax.Array, num_keys: jax.Array) -> jax.Array:
        return _attend(q, cache, layer, tokens.page_table[row], num_keys, scale, window)

    token = jnp.arange(1, len(q) + 1, dtype=jnp.int32)
    count = jnp.where(tokens.num_keys > 0, token, 0).max()
    return in_tiles(attend, q, tokens.row, tokens.num_keys, count=count, size=QUERIES)


def _attend(q, cache: KVCache, layer, page_table, num_keys, scale, window):
    """Of one tile: q [C, N, H], page_table i32[C, M], num_keys i32[C]."""
    # Padding may hold anything.
    scaled = jnp.where((num_keys > 0)[:, None, None], q.astype(jnp.float32) * scale, 0)
    queries = scaled.reshape(QUERIES, cache.num_kv_heads, -1, cache.head_dim)
    first_key = jnp.zeros_like(num_keys) if window is None else jnp.maximum(num_keys - window, 0)
    # Blocks that another token of the tile needs change nothing: their weights are 0, and a factor
    # of 1 is exact.
    first_block = jnp.where(num_keys > 0, first_key, first_key.max()).min() // BLOCK
    num_blocks = (num_keys.max() + BLOCK - 1) // BLOCK

    def add_block(state):
        block, top, total, out = state
        key = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        visible = (key < num_keys[:, None]) & (key >= first_key[:, None])
        k, v = jax.lax.optimization_barrier(_load(cache, layer, page_table, key))
        v = jnp.where(visible[:, :, None, None], v, 0)  # 0 times NaN is NaN
        visible = visible[:, None, None]
        scores = jnp.where(visible, jnp.einsum("ckgh,cskh->ckgs", queries, k), NEVER)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0)
        fade = jnp.exp(top - new_top)
        total = total * fade + weights.sum(axis=-1)
        out = out * fade[..., None] + jnp.einsum("ckgs,cskh->ckgh", weights, v)
        return block + 1, new_top, total, out

    top = jnp.full(queries.shape[:-1], NEVER)
    start = first_block, top, jnp.zeros_like(top), jnp.zeros_like(queries)
    _, _, total, out = jax.lax.while_loop(lambda state: state[0] < num_blocks, add_block, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def _load(cache: KVCache, layer, page_table, key):
    """Keys and values of all tokens' rows at the positions `key` i32[S]: f32[C, S, K, H]."""
    column = jnp.minimum(key // cache.page_size, page_table.shape[1] - 1)
    page = page_table[:, column] + layer * cache.num_pages
    offset = key % cache.page_size
    return tuple(x[page, :, offset].astype(jnp.float32) for x in (cache.k, cache.v))

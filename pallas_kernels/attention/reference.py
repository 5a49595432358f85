"""Paged attention in plain jnp: the meaning of the operation, and what runs on a CPU.

The work list of (tile of queries, block of keys) pairs is taken a chunk at a time, each chunk
merged into running softmax statistics (https://arxiv.org/abs/1805.02867), so the cost follows the
tokens that are really there: not the batch times its longest row, and not the padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.kv_cache import KVCache
from pallas_kernels.attention.ragged import RaggedBatch, Tiles, make_tiles

NEVER = -1e30  # a score below every real one; finite, because inf - inf is NaN


def plan(batch: RaggedBatch, cache: KVCache, num_tokens: int) -> Tiles:
    """Once per step: a decode batch (one token a row) in tiles of one, any other in tiles of 16."""
    is_decode = num_tokens == len(batch.seq_lens)
    return make_tiles(
        batch,
        num_tokens,
        tile_size=1 if is_decode else 16,
        block_size=32 if is_decode else 64,
    )


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KVCache,
    layer: Int32[Array, ""],
    tiles: Tiles,
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "T N H"]:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = cache.k.shape[1]
    group = num_heads // num_kv_heads
    chunk = len(tiles.row)
    grouped = q.reshape(num_tokens, num_kv_heads, group, head_dim).astype(jnp.float32) * scale
    grouped = jnp.pad(grouped, ((0, 1), (0, 0), (0, 0), (0, 0)))  # the query that a padding reads

    def merge_chunk(carry):
        step, top, total, out = carry
        item = step * chunk + jnp.arange(chunk, dtype=jnp.int32)
        tile = jnp.searchsorted(tiles.block_end, item, side="right")
        tile = jnp.minimum(tile, chunk - 1)
        is_live = item < tiles.block_end[-1]
        block = item - (tiles.block_end - tiles.num_blocks)[tile]
        row, query, position = tiles.row[tile], tiles.query[tile], tiles.position[tile]

        k, v, key = _load_block(cache, layer, tiles, row, block)
        scores = jnp.einsum("cqkgh,cksh->cqkgs", grouped[query], k)
        visible = (key[:, None] <= position[:, :, None]) & is_live[:, None, None]
        if window is not None:
            visible &= key[:, None] > position[:, :, None] - window
        visible = visible[:, :, None, None]
        scores = jnp.where(visible, scores, NEVER)

        # Where a query stands in several items of the chunk, the scatters do the merging.
        new_top = top.at[query].max(scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[query][..., None]), 0)
        decay = jnp.exp(top - new_top)
        total = (total * decay).at[query].add(weights.sum(axis=-1))
        partial = jnp.einsum("cqkgs,cksh->cqkgh", weights, v)
        out = (out * decay[..., None]).at[query].add(partial)
        return step + 1, new_top, total, out

    shape = grouped.shape[:-1]
    start = (
        jnp.int32(0),
        jnp.full(shape, NEVER, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(grouped.shape, jnp.float32),
    )
    *_, total, out = jax.lax.while_loop(
        lambda carry: carry[0] * chunk < tiles.block_end[-1], merge_chunk, start
    )
    out = out[:num_tokens] / jnp.maximum(total[:num_tokens, ..., None], 1e-30)
    return out.reshape(q.shape).astype(q.dtype)


def _load_block(cache: KVCache, layer, tiles: Tiles, row, block):
    """Keys and values f32[C, K, S, H] of one block per item, and the keys' positions i32[C, S]."""
    batch, page_size = tiles.batch, cache.page_size
    key = block[:, None] * tiles.block_size + jnp.arange(tiles.block_size, dtype=jnp.int32)
    last_page = batch.page_table.shape[1] - 1
    page = batch.page_table[row[:, None], jnp.minimum(key // page_size, last_page)]
    page = page + layer * cache.num_pages

    _, num_kv_heads, _, head_dim = cache.k.shape
    head = jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]
    line = (page[:, None] * num_kv_heads + head) * page_size + (key % page_size)[:, None]
    k = cache.k.reshape(-1, head_dim)[line].astype(jnp.float32)
    v = cache.v.reshape(-1, head_dim)[line].astype(jnp.float32)
    # 0 times NaN is NaN: what lies beyond the row's tokens must not reach the product.
    is_written = key < batch.seq_lens[row][:, None]
    return k, jnp.where(is_written[:, None, :, None], v, 0), key

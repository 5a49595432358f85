"""Paged attention in plain jnp: the meaning of the operation, and what runs on a CPU.

The work list of (tile of queries, block of keys) pairs is taken a few at a time, and what each pair
gives is merged into its tile's running softmax (https://arxiv.org/abs/1805.02867). So the cost
follows the tokens that are really there: not the batch times its longest row, and not the padding.
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.kv_cache import KVCache
from pallas_kernels.attention.ragged import RaggedBatch, Tiles, make_tiles, owner

NEVER = -1e30  # a score below every real one; finite, because inf - inf is NaN
# By platform. Pairs at a time: on a CPU so few that their keys stay in its L2 cache; elsewhere as
# many as there are tiles. Queries up to which each has a pass over the keys of its own: a CPU is
# slower at transposing keys for a product of matrices.
PAIRS = {"cpu": 4}
MOST_PASSES = {"cpu": 4}
# Of tiles and blocks of some pairs: keys and values f32[C, K, S, H], 0 for those of nobody, and
# which of the keys each query sees, bool[C, Q, S].
LoadPairs = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def plan(batch: RaggedBatch, cache: KVCache, num_tokens: int) -> Tiles:
    """Once per step: a decode batch (one token a row) in tiles of one, any other in tiles of 16."""
    is_decode = num_tokens == len(batch.seq_lens)
    pages_per_block = max(64 // cache.page_size, 1)
    return make_tiles(
        batch,
        num_tokens,
        tile_size=1 if is_decode else 16,
        block_size=pages_per_block * cache.page_size,
    )


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """A sum of values weighted by exp(score - top), not yet divided by the sum of its weights.

    Per tile or pair (`n` of them), KV head, and query of the tile that shares it.
    """

    top: Float[Array, "n K Q"]
    total: Float[Array, "n K Q"]
    out: Float[Array, "n K Q H"]


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KVCache,
    layer: Int32[Array, ""],
    tiles: Tiles,
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "T N H"]:
    positions = jnp.repeat(tiles.position, q.shape[1] // cache.num_kv_heads, axis=1)

    def load(tile: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        k, v, key = _load_block(cache, layer, tiles, tiles.row[tile], block)
        key, position = key[:, None], positions[tile][:, :, None]
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        return k, v, visible

    return attend_to_pairs(q, tiles, load, num_kv_heads=cache.num_kv_heads, scale=scale)


def attend_to_pairs(
    q: Float[Array, "T N H"], tiles: Tiles, load: LoadPairs, *, num_kv_heads: int, scale: float
) -> Float[Array, "T N H"]:
    """Attention of all tiles to what `load` gives of their blocks; padding tokens get zeros."""
    queries = _cut(q, tiles, num_kv_heads) * scale
    num_tiles = len(queries)
    at_once = min(PAIRS.get(jax.default_backend(), num_tiles), num_tiles)

    def attend_to_some(carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
        step, running = carry
        item = step * at_once + jnp.arange(at_once, dtype=jnp.int32)
        tile = owner(tiles.block_end, item)
        block = item - (tiles.block_end - tiles.num_blocks)[tile]
        k, v, visible = load(tile, block)
        visible &= (item < tiles.block_end[-1])[:, None, None]
        new = _attend(queries[tile], k, v, visible[:, None])
        return step + 1, _merge(running, tile, new)

    start = Softmax(
        top=jnp.full_like(queries[..., 0], NEVER),
        total=jnp.zeros_like(queries[..., 0]),
        out=jnp.zeros_like(queries),
    )
    _, done = jax.lax.while_loop(
        lambda carry: carry[0] * at_once < tiles.block_end[-1],
        attend_to_some,
        (jnp.int32(0), start),
    )
    out = done.out / jnp.maximum(done.total, 1e-30)[..., None]
    return _lay_out(out, tiles).reshape(q.shape).astype(q.dtype)


def _attend(q, k, v, visible) -> Softmax:
    """Of C pairs: q f32[C, K, Q, H], k and v f32[C, K, S, H], visible bool[C, 1, Q, S]."""
    scores = jnp.where(visible, _scores(q, k), NEVER)
    top = scores.max(axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0)
    return Softmax(top, weights.sum(axis=-1), jnp.einsum("ckqs,cksh->ckqh", weights, v))


def _scores(q, k):
    """f32[C, K, Q, S]"""
    num_queries = q.shape[2]
    if num_queries > MOST_PASSES.get(jax.default_backend(), 0):
        return jnp.einsum("ckqh,cksh->ckqs", q, k)
    passes = [jnp.einsum("ckh,cksh->cks", q[:, :, i], k) for i in range(num_queries)]
    return jnp.stack(passes, axis=2)


def _merge(running: Softmax, tile: Int32[Array, " C"], new: Softmax) -> Softmax:
    """What pairs have given goes to their tiles, which may be the same for several."""
    top = running.top.at[tile].max(new.top)
    fade, gain = jnp.exp(running.top[tile] - top[tile]), jnp.exp(new.top - top[tile])

    def add(old, more, fade, gain):
        return old.at[tile].set(old[tile] * fade).at[tile].add(more * gain)

    return Softmax(
        top,
        add(running.total, new.total, fade, gain),
        add(running.out, new.out, fade[..., None], gain[..., None]),
    )


def _cut(q: Float[Array, "T N H"], tiles: Tiles, num_kv_heads: int) -> Float[Array, "tiles K Q H"]:
    """The queries of each tile, in float32, those that share a KV head side by side; zeros for
    none, whatever padding tokens hold."""
    queries = q.at[tiles.query].get(mode="fill", fill_value=0).astype(jnp.float32)
    num_tiles, tile_size, _, head_dim = queries.shape
    queries = queries.reshape(num_tiles, tile_size, num_kv_heads, -1, head_dim).swapaxes(1, 2)
    return queries.reshape(num_tiles, num_kv_heads, -1, head_dim)


def _lay_out(out: Float[Array, "tiles K Q H"], tiles: Tiles) -> Float[Array, "T K G H"]:
    """The inverse of `_cut`; padding tokens get zeros."""
    num_tiles, num_kv_heads, _, head_dim = out.shape
    tile_size = tiles.query.shape[1]
    out = out.reshape(num_tiles, num_kv_heads, tile_size, -1, head_dim).swapaxes(1, 2)
    lines = out.reshape(num_tiles * tile_size, num_kv_heads, -1, head_dim)
    return lines.at[tiles.place].get(mode="fill", fill_value=0)


def _load_block(cache: KVCache, layer, tiles: Tiles, row, block):
    """Keys and values f32[C, K, S, H] of one block per pair, and the keys' positions i32[C, S]."""
    page_table, page_size = tiles.batch.page_table, cache.page_size
    pages_per_block = tiles.block_size // page_size
    key = block[:, None] * tiles.block_size + jnp.arange(tiles.block_size, dtype=jnp.int32)
    column = block[:, None] * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
    page = page_table[row[:, None], jnp.minimum(column, page_table.shape[1] - 1)]
    page = page[:, None] + layer * cache.num_pages
    head = jnp.arange(cache.num_kv_heads, dtype=jnp.int32)[:, None]

    def load(pages: jax.Array) -> jax.Array:
        shape = len(block), cache.num_kv_heads, tiles.block_size, cache.head_dim
        return pages[page, head].astype(jnp.float32).reshape(shape)

    # 0 times NaN is NaN: what lies beyond the row's tokens must not reach the product.
    is_written = key < tiles.batch.seq_lens[row][:, None]
    return load(cache.k), jnp.where(is_written[:, None, :, None], load(cache.v), 0), key

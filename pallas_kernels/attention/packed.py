"""Bidirectional attention of packed rows: a token sees all of its own row, nothing is cached.

"reference" is the meaning: one matrix of T * T scores. "tiles" costs each row its own square, in
blocks of bounded size.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.ragged import RaggedBatch, Tiles, make_tiles, owner
from pallas_kernels.attention.reference import NEVER, attend_to_pairs

TILE, BLOCK = 32, 64  # queries and keys


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPlan:
    """One implementation's preparation for one batch."""

    details: Any
    implementation: str = dataclasses.field(metadata={"static": True})


def plan_packed(
    query_start_loc: Int32[Array, " starts"], *, num_tokens: int, implementation: str = "tiles"
) -> PackedPlan:
    """What `packed_attention` needs to know of a batch, computed once for all layers.

    Args:
      query_start_loc: row `b` owns the tokens `query_start_loc[b] : query_start_loc[b + 1]`.
      num_tokens: of the packed batch, with padding.
      implementation: by name.

    Raises:
      ValueError: there is no such implementation.
    """
    if implementation not in PLANS:
        raise ValueError(f"implementation={implementation!r}: choose from {sorted(PLANS)}")
    return PackedPlan(PLANS[implementation](query_start_loc, num_tokens), implementation)


def packed_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    plan: PackedPlan,
    *,
    scale: float | None = None,
) -> Float[Array, "T N H"]:
    """Each query attends to all keys of its own row.

    Args:
      plan: of this batch.
      scale: of the scores, `H ** -0.5` unless given.

    Returns:
      The packed outputs; padding tokens get zeros. What a row holds, NaN too, reaches no other.

    Raises:
      ValueError: the query heads are no multiple of the KV heads.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return APPLY[plan.implementation](q, k, v, plan.details, scale)


def _rows(query_start_loc: jax.Array, num_tokens: int) -> Int32[Array, " T"]:
    """Whose each token is; -1 for padding."""
    ends, token = query_start_loc[1:], jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.where(token < ends[-1], owner(ends, token), -1)


def _dense(q, k, v, rows: Int32[Array, " T"], scale: float):
    num_tokens, num_heads, head_dim = q.shape
    grouped = q.reshape(num_tokens, k.shape[1], -1, head_dim).astype(jnp.float32)
    scores = jnp.einsum("tkgh,skh->kgts", grouped, k.astype(jnp.float32)) * scale
    visible = (rows[:, None] == rows) & (rows >= 0)
    scores = jnp.where(visible, scores, NEVER)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)
    # 0 times NaN is NaN: values that are not visible are taken out of each product.
    seen = jnp.where(visible[:, :, None, None], v.astype(jnp.float32), 0)
    return jnp.einsum("kgts,tskh->tkgh", weights, seen).reshape(q.shape).astype(q.dtype)


def _plan_tiles(query_start_loc: jax.Array, num_tokens: int) -> Tiles:
    batch = RaggedBatch(
        page_table=jnp.zeros((len(query_start_loc) - 1, 0), jnp.int32),
        seq_lens=query_start_loc[1:] - query_start_loc[:-1],
        query_start_loc=query_start_loc,
    )
    return make_tiles(batch, num_tokens, TILE, BLOCK, is_causal=False)


def _tiled(q, k, v, tiles: Tiles, scale: float):
    num_kv_heads, queries_per_tile = k.shape[1], TILE * (q.shape[1] // k.shape[1])

    def load(tile: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        row = tiles.row[tile]
        key = block[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)  # in its row
        is_own = key < tiles.batch.seq_lens[row][:, None]
        token = jnp.where(is_own, tiles.batch.query_start_loc[row][:, None] + key, len(k))

        def take(x: jax.Array) -> jax.Array:
            taken = x.at[token].get(mode="fill", fill_value=0)
            return taken.astype(jnp.float32).swapaxes(1, 2)

        shape = len(tile), queries_per_tile, BLOCK
        return take(k), take(v), jnp.broadcast_to(is_own[:, None], shape)

    return attend_to_pairs(q, tiles, load, num_kv_heads=num_kv_heads, scale=scale)


PLANS = {"tiles": _plan_tiles, "reference": _rows}
APPLY = {"tiles": _tiled, "reference": _dense}

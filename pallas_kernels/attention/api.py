"""Paged attention: checks its arguments, then calls the first implementation that can.

In two phases: `plan` once per step, from the batch alone; `write_kv` and `paged_attention` once
per layer.
"""

from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import reference
from pallas_kernels.attention.kv_cache import KVCache as KVCache
from pallas_kernels.attention.kv_cache import empty_kv_cache as empty_kv_cache
from pallas_kernels.attention.kv_cache import kv_cache_shape as kv_cache_shape
from pallas_kernels.attention.kv_cache import write_kv as write_kv
from pallas_kernels.attention.ragged import RaggedBatch as RaggedBatch
from pallas_kernels.backend import first_that_can

PLANS = {"reference": reference.plan}
IMPLEMENTATIONS = {"reference": reference.paged_attention}


def plan(batch: RaggedBatch, num_tokens: int, *, implementation: str | None = None) -> Any:
    """What `paged_attention` needs to know of the batch, computed once for all layers."""
    return first_that_can(PLANS, implementation, batch, num_tokens)


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KVCache,
    layer: Int32[Array, ""],
    plan: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Each query attends to its own row's keys up to its own position, in `layer` of the cache.

    The step's own keys and values must be in the cache already (`write_kv`).

    Args:
      q: packed queries; `N` is a multiple of the cache's KV heads.
      plan: from `plan`, for this batch and this implementation.
      scale: of the scores, `H ** -0.5` unless given.
      window: a query sees the last `window` positions, its own among them; None for all.

    Returns:
      The packed outputs; padding tokens get zeros.

    Raises:
      ValueError: the heads or the head size do not fit the cache, or the window is not positive.
      NotImplementedError: no implementation can do it.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, _, cache_head_dim = cache.k.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if head_dim != cache_head_dim:
        raise ValueError(f"queries have head_dim {head_dim}, the cache has {cache_head_dim}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1")
    scale = head_dim**-0.5 if scale is None else scale
    return first_that_can(
        IMPLEMENTATIONS, implementation, q, cache, layer, plan, scale=scale, window=window
    )

"""Paged attention: checks its arguments, then runs the first implementation that can.

In two phases: `plan` once per step, from the batch; `write_kv` and `paged_attention` once per
layer. The plan remembers whose it is.
"""

import dataclasses
import typing
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import batch_invariant, reference, triton
from pallas_kernels.attention.kv_cache import KVCache as KVCache
from pallas_kernels.attention.kv_cache import empty_kv_cache as empty_kv_cache
from pallas_kernels.attention.kv_cache import kv_cache_shape as kv_cache_shape
from pallas_kernels.attention.kv_cache import write_kv as write_kv
from pallas_kernels.attention.ragged import RaggedBatch as RaggedBatch
from pallas_kernels.backend import first_that_can

# "triton-interpret" runs the meaning of the Triton kernels anywhere, slowly: for tests.
# "batch-invariant" is slow too, and never chosen unasked.
PLANS = {
    "triton": triton.plan,
    "triton-interpret": triton.plan_interpreted,
    "reference": reference.plan,
    "batch-invariant": batch_invariant.plan,
}
PREFERENCE = {"gpu": ("triton", "reference")}  # by platform; elsewhere the reference
APPLY = {
    "triton": triton.paged_attention,
    "triton-interpret": triton.paged_attention,
    "reference": reference.paged_attention,
    "batch-invariant": batch_invariant.paged_attention,
}


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """One implementation's preparation for one batch."""

    details: Any
    implementation: str = dataclasses.field(metadata={"static": True})

    def cut(self, start: Int32[Array, ""]) -> "Plan":
        """That of a tile of tokens (`fixed_tiles`); only "batch-invariant" has such."""
        return dataclasses.replace(self, details=self.details.cut(start))


def plan(
    batch: RaggedBatch,
    cache: KVCache,
    *,
    num_tokens: int,
    implementation: str | None = None,
) -> Plan:
    """What `paged_attention` needs to know of a batch, computed once for all layers.

    Args:
      num_tokens: of the packed batch, with padding; as many as rows means one token a row.
      implementation: by name, the best one for this device unless given.

    Raises:
      NotImplementedError: no implementation can do it, or the one named cannot.
    """
    names = PREFERENCE.get(jax.default_backend(), ("reference",))
    names = names if implementation is None else (implementation,)
    name, details = first_that_can(PLANS, names, batch, cache, num_tokens)
    return Plan(details, name)


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KVCache,
    layer: Int32[Array, ""],
    plan: Plan,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Float[Array, "T N H"]:
    """Each query attends to its own row's keys up to its own position, in `layer` of the cache.

    The step's own keys and values must be in the cache already (`write_kv`).

    Args:
      q: packed queries.
      plan: of this batch.
      scale: of the scores, `H ** -0.5` unless given.
      window: a query sees the last `window` positions, its own among them; None for all.

    Returns:
      The packed outputs; padding tokens get zeros.

    Raises:
      ValueError: the heads or their size do not fit the cache, or the window is not positive.
    """
    _, num_heads, head_dim = q.shape
    if num_heads % cache.num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads are no multiple of {cache.num_kv_heads} KV heads"
        )
    if head_dim != cache.head_dim:
        raise ValueError(f"queries have head_dim {head_dim}, the cache has {cache.head_dim}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1")
    scale = head_dim**-0.5 if scale is None else scale
    apply = APPLY[plan.implementation]
    return apply(q, cache, layer, plan.details, scale=scale, window=window)

"""The `attend` that serving injects into a model: keys and values go to pages of the cache."""

import dataclasses
import typing

import jax
from jaxtyping import Array, Bool, Int32

from pallas_kernels import attention
from pallas_kernels.attention import KVCache, Plan, RaggedBatch


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedAttention:
    cache: KVCache
    slot_mapping: Int32[Array, " T"]
    plan: Plan
    is_live: Bool[Array, " T"]

    @classmethod
    def of(
        cls,
        cache: KVCache,
        slot_mapping: Int32[Array, " T"],
        batch: RaggedBatch,
        is_live: Bool[Array, " T"],
        *,
        implementation: str | None = None,
    ):
        plan = attention.plan(
            batch,
            cache,
            num_tokens=len(slot_mapping),
            implementation=implementation,
        )
        return cls(cache, slot_mapping, plan, is_live)

    def __call__(self, layer, q, k, v, *, window=None):
        cache = attention.write_kv(self.cache, layer, k, v, self.slot_mapping)
        out = attention.paged_attention(q, cache, layer, self.plan, window=window)
        return out, dataclasses.replace(self, cache=cache)

    def note_experts(self, layer, expert_ids):
        return self

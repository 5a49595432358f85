"""The `attend` that serving injects into a model: keys and values go to pages of the cache."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int16, Int32

from pallas_kernels import attention
from pallas_kernels.attention import KVCache, Plan, RaggedBatch
from pallas_kernels.fixed_tiles import TILE


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedAttention:
    cache: KVCache
    slot_mapping: Int32[Array, " T"]
    plan: Plan
    expert_ids: Int16[Array, "T L k"] | None = None  # that the tokens took, in layers that have any

    @classmethod
    def of(
        cls,
        cache: KVCache,
        slot_mapping: Int32[Array, " T"],
        batch: RaggedBatch,
        *,
        implementation: str | None = None,
    ):
        plan = attention.plan(
            batch,
            cache,
            num_tokens=len(slot_mapping),
            implementation=implementation,
        )
        return cls(cache, slot_mapping, plan)

    def __call__(self, layer, q, k, v, *, window=None):
        cache = attention.write_kv(self.cache, layer, k, v, self.slot_mapping)
        out = attention.paged_attention(q, cache, layer, self.plan, window=window)
        return out, self.with_cache(cache)

    def with_cache(self, cache: KVCache) -> "PagedAttention":
        return dataclasses.replace(self, cache=cache)

    def note_experts(self, expert_ids):
        # All layers at once: each by itself would be a kernel more in each of them.
        stacked = jnp.stack(expert_ids, axis=1).astype(jnp.int16) if expert_ids else None
        return dataclasses.replace(self, expert_ids=stacked)

    @property
    def is_live(self) -> Bool[Array, " T"]:
        """What goes to the trash page is padding."""
        return self.slot_mapping >= self.cache.page_size

    @property
    def num_live(self) -> Int32[Array, ""]:
        """Tokens up to the last that is kept."""
        token = jnp.arange(len(self.slot_mapping), dtype=jnp.int32)
        return jnp.where(self.is_live, token + 1, 0).max()

    def cut(self, start: Int32[Array, ""]) -> "PagedAttention":
        """That of the tile of tokens that begins at `start` (`Plan.cut`)."""
        token = start + jnp.arange(TILE, dtype=jnp.int32)
        slots = self.slot_mapping.at[token].get(mode="fill", fill_value=0)
        return dataclasses.replace(self, slot_mapping=slots, plan=self.plan.cut(start))

"""The `attend` of an encoder: each token sees its whole text, and nothing is kept."""

import dataclasses
import typing

import jax
from jaxtyping import Array, Bool, Int32

from pallas_kernels import attention
from pallas_kernels.attention import PackedPlan


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedAttention:
    plan: PackedPlan
    is_live: Bool[Array, " T"]

    @classmethod
    def of(cls, query_start_loc: Int32[Array, " starts"], is_live: Bool[Array, " T"]):
        """Args:
        query_start_loc: as `RaggedBatch` has it; every row holds a whole text.
        """
        plan = attention.plan_packed(query_start_loc, num_tokens=len(is_live))
        return cls(plan, is_live)

    def __call__(self, layer, q, k, v, *, window=None):
        if window is not None:
            raise NotImplementedError(f"window={window}: of packed rows all is seen")
        return attention.packed_attention(q, k, v, self.plan), self

    def note_experts(self, expert_ids):
        return self

"""What a model and its caller agree on. A model computes q, k and v; how they attend is injected.

The same model file therefore serves from a paged cache, trains with dense causal attention and
never sees a page.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class Attend(Protocol):
    """A pytree that the model threads through its layers."""

    @property
    def is_live(self) -> Bool[Array, " T"] | None:
        """False for padding tokens, which no expert is to compute; None where all are live."""
        ...

    def __call__(
        self,
        layer: Int32[Array, ""],
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        *,
        window: int | None,
    ) -> tuple[Float[Array, "T N H"], Self]:
        """Attention of the tokens of one layer, and itself with whatever it has stored."""
        ...

    def note_experts(self, expert_ids: Sequence[Int32[Array, "T k"]]) -> Self:
        """Is told which experts the tokens take, padding tokens too, in each layer that has any;
        returns itself with whatever it keeps of that."""
        ...


class Embedder(Protocol):
    """A decoder without a head that predicts tokens, or an encoder."""

    def __call__[A: Attend](
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: A
    ) -> tuple[Float[Array, "T D"], A]:
        """The last layer's normalised hidden states of packed tokens."""
        ...


class CausalLM(Embedder, Protocol):
    """A decoder that predicts the next token."""

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Scores of every token of the vocabulary, in float32."""
        ...


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CausalAttention:
    """Dense causal attention over the packed tokens themselves; nothing is stored. For training.

    Tokens of different segments do not see each other. Costs T * T whatever the segments are; with
    `num_rows` rows of equal length, one after the other, only each row's own square.
    """

    segment_ids: Int32[Array, " T"] | None = None
    is_live: Bool[Array, " T"] | None = None
    num_rows: int = dataclasses.field(default=1, metadata={"static": True})

    def __call__(self, layer, q, k, v, *, window=None):
        per_token = (q, k, v) if self.segment_ids is None else (q, k, v, self.segment_ids)
        rows = [x.reshape(self.num_rows, -1, *x.shape[1:]) for x in per_token]
        attend = functools.partial(_attend_causally, window=window)
        out = jax.vmap(attend)(*rows) if self.num_rows > 1 else attend(*(x[0] for x in rows))
        return out.reshape(q.shape), self

    def note_experts(self, expert_ids):
        return self


def _attend_causally(q, k, v, segment_ids=None, *, window):
    """Of one row: q [L, N, H], k and v [L, K, H]."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("tkgh,skh->kgts", grouped, k, preferred_element_type=jnp.float32)
    query, key = jnp.arange(num_tokens)[:, None], jnp.arange(num_tokens)[None]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if segment_ids is not None:
        visible &= segment_ids[:, None] == segment_ids[None]
    scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("kgts,skh->tkgh", weights, v).reshape(q.shape)

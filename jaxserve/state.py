"""What stays on the device from step to step.

Every array has one shape for all buckets and is donated to the programs that change it: a buffer
whose address changes makes XLA patch its CUDA graph at each launch, which costs two to three times
the host's time.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int16, Int32

from jaxserve.step_plan import (
    NO_TOKEN,
    NUM_EXTRAS,
    NUM_SAMPLING,
    NUM_STOP_IDS,
    NUM_TOPS,
    RUNNING,
    STOPPED,
)
from pallas_kernels.attention import KVCache, empty_kv_cache, kv_cache_shape

OUT_COLUMNS = 3  # of `State.out`: token, what has become of the row, its logprob as float bits


@typing.no_type_check  # a pytree: its leaves are sometimes shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """R requests at most, one row each; row R is the trash row, which padding reads and writes."""

    kv: KVCache | None  # None of an encoder, which keeps nothing
    page_table: Int32[Array, "R+1 M"]
    seq_len: Int32[Array, " R+1"]  # tokens in the cache
    last_token: Int32[Array, " R+1"]  # sampled, not yet in the cache
    finish: Int32[Array, " R+1"]  # RUNNING, or why not
    limit: Int32[Array, " R+1"]  # tokens in the cache beyond which nothing is sampled
    stop_ids: Int32[Array, "R+1 8"]  # -1 for none
    sampling: Int32[Array, "R+1 11"]  # as `step_plan.pack_sampling` packs it
    extras: Int32[Array, "R+1 E"]  # as `step_plan.pack_extras` packs it, without the row
    counts: Int32[Array, "R+1 V"]  # of each token in the output; only of rows that ask for it
    batch: Int32[Array, " R"]  # the rows that a decode step runs, then the trash row
    sampling_rows: Int32[Array, " R"]  # those of an extend step that get a token, likewise
    sampling_tokens: Int32[Array, " R"]  # where in `hidden` each of these has its newest token
    hidden: Float[Array, "T D"]  # of an extend step's tokens, from forward to sample
    out: Int32[Array, "K R+1 C"]  # what the host reads of a step
    tops: Int32[Array, "K R+1 W"]  # and, where anybody asks for it, this
    pooled: Float[Array, "R+1 P"] | None = None  # each row's vector, in an engine that makes them
    # The choices of a dispatch's tokens, in each layer that has experts; -1 for padding.
    expert_ids: Int16[Array, "N L k"] | None = None


@dataclasses.dataclass(frozen=True)
class StateShape:
    """The sizes that a state is made of."""

    max_rows: int
    pages_per_row: int
    max_steps: int  # K: decode steps in one dispatch
    max_tokens: int  # of an extend step
    num_layers: int  # that keep keys and values
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    dtype: jnp.dtype
    pooled_size: int = 0  # numbers of a row's vector; 0: tokens are predicted
    num_sparse_layers: int = 0  # with experts whose choices are noted
    experts_per_token: int = 0

    @property
    def num_bytes(self) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(self.create))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def create(self) -> State:
        """A state without requests."""
        rows, trash = self.max_rows + 1, self.max_rows

        def zeros(*sizes: int) -> jax.Array:
            return jnp.zeros(sizes, jnp.int32)

        return State(
            kv=self._empty_cache() if self.num_layers else None,
            page_table=zeros(rows, self.pages_per_row),
            seq_len=zeros(rows),
            last_token=zeros(rows),
            finish=jnp.full(rows, RUNNING, jnp.int32).at[trash].set(STOPPED),
            limit=zeros(rows),
            stop_ids=jnp.full((rows, NUM_STOP_IDS), -1, jnp.int32),
            sampling=zeros(rows, NUM_SAMPLING),
            extras=jnp.full((rows, NUM_EXTRAS), NO_TOKEN, jnp.int32),
            counts=zeros(rows, 1 if self.pooled_size else self.vocab_size),
            batch=jnp.full(self.max_rows, trash, jnp.int32),
            sampling_rows=jnp.full(self.max_rows, trash, jnp.int32),
            sampling_tokens=zeros(self.max_rows),
            hidden=jnp.zeros((self.max_tokens, self.hidden_size), self.dtype),
            out=zeros(self.max_steps, rows, OUT_COLUMNS),
            tops=zeros(self.max_steps, rows, NUM_TOPS),
            pooled=jnp.zeros((rows, self.pooled_size), jnp.float32) if self.pooled_size else None,
            expert_ids=self._no_experts() if self.num_sparse_layers else None,
        )

    def _empty_cache(self) -> KVCache:
        shape = kv_cache_shape(
            num_layers=self.num_layers,
            num_pages=self.num_pages,
            page_size=self.page_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )
        return empty_kv_cache(shape, self.num_pages, self.dtype)

    def _no_experts(self) -> jax.Array:
        num_tokens = max(self.max_tokens, self.max_steps * self.max_rows)
        sizes = num_tokens, self.num_sparse_layers, self.experts_per_token
        return jnp.full(sizes, -1, jnp.int16)

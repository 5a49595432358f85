"""The pure functions that a step is made of; `runner` compiles them for every bucket.

Each takes the whole state, donated, and returns it: leaves that it does not touch pass through
where they are. Model-independent but for the `CausalLM` protocol.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxserve import sampling as sampling_ops
from jaxserve.models.interface import CausalLM
from jaxserve.paged_attention import PagedAttention
from jaxserve.state import State
from jaxserve.step_plan import KEEP, LAST_TOKEN, PATCH_HEADER
from pallas_kernels.attention import RaggedBatch

Merge = Callable[[tuple[jax.Array, ...]], CausalLM]  # flat weights to a model


def patch(state: State, upload: Int32[Array, "P W"]) -> State:
    """Rewrites whole rows of the state: `StepPlan.patch`."""
    rows, seq_len, last_token = upload[:, 0], upload[:, 1], upload[:, 2]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new)

    return dataclasses.replace(
        state,
        seq_len=put(state.seq_len, seq_len),
        last_token=put(
            state.last_token, jnp.where(last_token == KEEP, state.last_token[rows], last_token)
        ),
        sampling=put(state.sampling, upload[:, 3:PATCH_HEADER]),
        page_table=put(state.page_table, upload[:, PATCH_HEADER:]),
    )


def forward(
    merge: Merge,
    num_tokens: int,
    num_rows: int,
    weights: tuple[jax.Array, ...],
    state: State,
    upload: Int32[Array, " packed"],
) -> State:
    """Runs the model over the packed tokens of some rows (`StepPlan.forward`): writes their keys
    and values, and each row's newest hidden state."""
    rows, lengths, tokens = jnp.split(upload, [num_rows, 2 * num_rows])
    ends = jnp.cumsum(lengths)
    starts = ends - lengths
    context = state.seq_len[rows]

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(ends, token, side="right"), num_rows - 1)
    is_live = token < ends[-1]
    positions = jnp.where(is_live, context[owner] + token - starts[owner], 0)
    tokens = jnp.where(tokens == LAST_TOKEN, state.last_token[rows][owner], tokens)

    page_table = state.page_table[rows]
    page_size = state.kv.page_size
    slots = page_table[owner, positions // page_size] * page_size + positions % page_size
    batch = RaggedBatch(
        page_table=page_table,
        seq_lens=context + lengths,
        query_start_loc=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
    )
    attend = PagedAttention.of(state.kv, jnp.where(is_live, slots, 0), batch)
    hidden, attend = merge(weights)(tokens, positions, attend)
    newest = hidden[jnp.maximum(ends - 1, 0)]
    return dataclasses.replace(
        state,
        kv=attend.cache,
        seq_len=state.seq_len.at[rows].set(context + lengths),
        hidden=state.hidden.at[rows].set(newest),
    )


def sample(
    merge: Merge,
    sampler: str,
    weights: tuple[jax.Array, ...],
    state: State,
    rows: Int32[Array, " B"],
) -> State:
    """Draws the next token of each row from its newest hidden state, and notes it in `out`."""
    logits: Float[Array, "B V"] = merge(weights).logits(state.hidden[rows])
    if sampler == "greedy":
        tokens = sampling_ops.greedy(logits)
    else:
        tokens = sampling_ops.sample(logits, state.sampling[rows], state.seq_len[rows])
    is_finite = jnp.isfinite(logits).all(axis=-1).astype(jnp.int32)
    return dataclasses.replace(
        state,
        last_token=state.last_token.at[rows].set(tokens),
        out=state.out.at[rows].set(jnp.stack([tokens, is_finite], axis=-1)),
    )


def peek(out: Int32[Array, "rows C"]) -> Int32[Array, "rows C"]:
    """A fresh copy: a donated array cannot be read once the next program has taken it."""
    return out + 0

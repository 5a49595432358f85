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
from jaxserve.step_plan import (
    KEEP,
    LAST_TOKEN,
    NOT_FINITE,
    OUT_OF_LENGTH,
    PATCH_HEADER,
    RUNNING,
    SAMPLING_START,
    STOPPED,
    Sampler,
)
from pallas_kernels.attention import RaggedBatch

Weights = tuple[jax.Array, ...]
Merge = Callable[[Weights], CausalLM]  # flat weights to a model


def patch(num_lines: int, state: State, upload: Int32[Array, " packed"]) -> State:
    """Rewrites rows of the state and the batch: `StepPlan.patch`."""
    max_rows = len(state.batch)
    lines = upload[:-max_rows].reshape(num_lines, -1)
    rows, seq_len, last_token, finish, limit = lines[:, :5].T

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new)

    def put_or_keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return put(old, jnp.where(new == KEEP, old[rows], new))

    return dataclasses.replace(
        state,
        seq_len=put_or_keep(state.seq_len, seq_len),
        last_token=put_or_keep(state.last_token, last_token),
        finish=put_or_keep(state.finish, finish),
        limit=put(state.limit, limit),
        stop_ids=put(state.stop_ids, lines[:, 5:SAMPLING_START]),
        sampling=put(state.sampling, lines[:, SAMPLING_START:PATCH_HEADER]),
        page_table=put(state.page_table, lines[:, PATCH_HEADER:]),
        batch=upload[-max_rows:],
    )


def copy_pages(state: State, upload: Int32[Array, "C 3"]) -> State:
    """Copies the first tokens of pages to other pages, in all layers, and zeroes the rest of those:
    what a freed page held must not be read, not even times zero."""
    source, target, kept = upload.T
    cache = state.kv

    # Pages of all layers along one axis: a scatter over any other but the first copies the cache.
    first_page = jnp.arange(0, len(cache.k), cache.num_pages)[:, None]
    source, target = ((first_page + page).reshape(-1) for page in (source, target))
    is_kept = jnp.arange(cache.page_size) < jnp.tile(kept, len(first_page))[:, None]

    def copy(pages: jax.Array) -> jax.Array:
        moved = jnp.where(is_kept[:, None, :, None], pages[source], 0)
        return pages.at[target].set(moved)

    return dataclasses.replace(
        state, kv=dataclasses.replace(cache, k=copy(cache.k), v=copy(cache.v))
    )


def extend(
    merge: Merge,
    attention: str | None,
    num_tokens: int,
    num_rows: int,
    weights: Weights,
    state: State,
    upload: Int32[Array, " packed"],
) -> State:
    """Runs the model over the packed tokens of some rows (`StepPlan.forward`): writes their keys
    and values, and each row's newest hidden state. Notes the rows that are to sample."""
    rows, lengths, samples, tokens = jnp.split(upload, [num_rows, 2 * num_rows, 3 * num_rows])
    ends = jnp.cumsum(lengths)
    starts = ends - lengths
    # A row may have finished in a step whose result the host had not seen yet.
    is_running = state.finish[rows] == RUNNING

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    # Not jnp.searchsorted: it becomes a loop, and a loop splits the CUDA graph.
    owner = jnp.minimum((ends <= token[:, None]).sum(axis=1, dtype=jnp.int32), num_rows - 1)
    is_live = (token < ends[-1]) & is_running[owner]
    positions = jnp.where(is_live, state.seq_len[rows][owner] + token - starts[owner], 0)
    tokens = jnp.where(tokens == LAST_TOKEN, state.last_token[rows][owner], tokens)
    state, hidden = _run_model(
        merge(weights),
        attention,
        state,
        tokens,
        positions,
        is_live=is_live,
        owner=rows[owner],
        batch=RaggedBatch(
            page_table=state.page_table[rows],
            seq_lens=state.seq_len[rows] + lengths,
            query_start_loc=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
        ),
    )
    trash = len(state.batch)
    sampling_rows = jnp.where(is_running & (samples > 0), rows, trash)
    return dataclasses.replace(
        state,
        seq_len=state.seq_len.at[rows].add(jnp.where(is_running, lengths, 0)),
        hidden=state.hidden.at[rows].set(hidden[jnp.maximum(ends - 1, 0)]),
        sampling_rows=jnp.pad(sampling_rows, (0, trash - num_rows), constant_values=trash),
    )


def sample(merge: Merge, sampler: Sampler, num_rows: int, weights: Weights, state: State) -> State:
    """Gives each of an extend step's sampling rows its next token."""
    rows = state.sampling_rows[:num_rows]
    return _sample_rows(merge(weights), sampler, state, rows, state.hidden[rows], jnp.int32(0))


def decode(
    merge: Merge,
    attention: str | None,
    sampler: Sampler,
    num_rows: int,
    num_steps: int,
    weights: Weights,
    state: State,
) -> State:
    """Gives each row of the batch its next `num_steps` tokens, as long as it is running."""
    model = merge(weights)
    rows, trash = state.batch[:num_rows], len(state.batch)

    def one(step: jax.Array, state: State) -> State:
        is_running = state.finish[rows] == RUNNING
        positions = jnp.where(is_running, state.seq_len[rows], 0)
        state, hidden = _run_model(
            model,
            attention,
            state,
            state.last_token[rows],
            positions,
            is_live=is_running,
            owner=rows,
            batch=RaggedBatch(
                page_table=state.page_table[rows],
                seq_lens=positions + 1,
                query_start_loc=jnp.arange(num_rows + 1, dtype=jnp.int32),
            ),
        )
        live_rows = jnp.where(is_running, rows, trash)
        state = dataclasses.replace(
            state, seq_len=state.seq_len.at[rows].add(is_running.astype(jnp.int32))
        )
        return _sample_rows(model, sampler, state, live_rows, hidden, step)

    if num_steps == 1:
        return one(jnp.int32(0), state)
    return jax.lax.fori_loop(0, num_steps, one, state)


def peek(out: Int32[Array, "K rows C"]) -> Int32[Array, "K rows C"]:
    """A fresh copy: a donated array cannot be read once the next program has taken it."""
    return out + 0


def _run_model(
    model: CausalLM,
    attention: str | None,
    state: State,
    tokens,
    positions,
    *,
    is_live,
    owner,
    batch,
) -> tuple[State, Float[Array, "T D"]]:
    """The packed tokens' hidden states; their keys and values go to their rows' pages, those of
    tokens that are not live to the trash page."""
    page_size = state.kv.page_size
    slots = state.page_table[owner, positions // page_size] * page_size + positions % page_size
    slots = jnp.where(is_live, slots, 0)
    attend = PagedAttention.of(state.kv, slots, batch, implementation=attention)
    hidden, attend = model(tokens, positions, attend)
    return dataclasses.replace(state, kv=attend.cache), hidden


def _sample_rows(
    model: CausalLM, sampler: Sampler, state: State, rows, hidden: Float[Array, "B D"], step
) -> State:
    """Draws the next token of each row and decides whether it was its last."""
    logits: Float[Array, "B V"] = model.logits(hidden)
    if sampler == "greedy":
        tokens = sampling_ops.greedy(logits)
    else:
        tokens = sampling_ops.sample(logits, state.sampling[rows], state.seq_len[rows])
    is_stop = (tokens[:, None] == state.stop_ids[rows]).any(axis=-1)
    finish = jnp.select(
        [~jnp.isfinite(logits).all(axis=-1), is_stop, state.seq_len[rows] >= state.limit[rows]],
        [NOT_FINITE, STOPPED, OUT_OF_LENGTH],
        RUNNING,
    ).astype(jnp.int32)
    finish = jnp.where(rows == len(state.batch), STOPPED, finish)  # the trash row never runs
    return dataclasses.replace(
        state,
        last_token=state.last_token.at[rows].set(tokens),
        finish=state.finish.at[rows].set(finish),
        out=state.out.at[step, rows].set(jnp.stack([tokens, finish], axis=-1)),
    )

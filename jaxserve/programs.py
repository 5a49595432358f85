"""The pure functions that a step is made of; `runner` compiles them for every bucket.

Each takes the whole state, donated, and returns it: leaves that it does not touch pass through
where they are. Model-independent but for the `CausalLM` protocol.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int16, Int32, Num

from jaxserve import sampling as sampling_ops
from jaxserve.models.batch_invariant import BatchInvariant, rowwise
from jaxserve.models.heads import vectors_of
from jaxserve.models.interface import CausalLM, Embedder
from jaxserve.models.packed_attention import PackedAttention
from jaxserve.models.paged_attention import PagedAttention
from jaxserve.models.pooling import PoolingConfig, PoolingMode
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
from pallas_kernels.attention import RaggedBatch, ragged

Weights = tuple[jax.Array, ...]
Merge = Callable[[Weights], CausalLM | Embedder]  # flat weights to a model


def merger(graphdef: nnx.GraphDef, abstract: nnx.State, *, deterministic: bool) -> Merge:
    """Of a model's parameters (`create_model`), as flat as `jax.tree.leaves` has them."""
    treedef = jax.tree.structure(abstract)

    def merge(weights: Weights) -> CausalLM | Embedder:
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))
        return BatchInvariant(model) if deterministic else model

    return merge


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
        batch=_overwrite(state.batch, upload[-max_rows:]),
    )


def set_extras(state: State, upload: Int32[Array, "P line"]) -> State:
    """Rewrites lines of extras: `StepPlan.extras`."""
    return dataclasses.replace(state, extras=state.extras.at[upload[:, 0]].set(upload[:, 1:]))


def set_counts(state: State, upload: Int32[Array, " packed"]) -> State:
    """Rewrites the counts of the row that comes first in `upload`."""
    return dataclasses.replace(state, counts=state.counts.at[upload[0]].set(upload[1:]))


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
    owner = ragged.owner(ends, token)
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
    padding = (0, trash - num_rows)
    return dataclasses.replace(
        state,
        seq_len=state.seq_len.at[rows].add(jnp.where(is_running, lengths, 0)),
        hidden=jax.lax.dynamic_update_slice(state.hidden, hidden, (0, 0)),
        sampling_rows=_overwrite(
            state.sampling_rows, jnp.pad(sampling_rows, padding, constant_values=trash)
        ),
        sampling_tokens=_overwrite(
            state.sampling_tokens, jnp.pad(jnp.maximum(ends - 1, 0), padding)
        ),
    )


def sample(merge: Merge, sampler: Sampler, num_rows: int, weights: Weights, state: State) -> State:
    """Gives each of an extend step's sampling rows its next token."""
    rows = state.sampling_rows[:num_rows]
    hidden = state.hidden[state.sampling_tokens[:num_rows]]
    return _sample_rows(merge(weights), sampler, state, rows, hidden, jnp.int32(0))


def accumulate(
    mode: PoolingMode,
    num_tokens: int,
    num_rows: int,
    state: State,
    upload: Int32[Array, " packed"],
) -> State:
    """Takes an extend step's tokens (`StepPlan.forward`) into what their rows are pooled from: the
    first token's hidden state, or the sum or the maximum of all until now."""
    rows, lengths = jnp.split(upload[: 2 * num_rows], 2)
    ends = jnp.cumsum(lengths)
    starts, token = ends - lengths, jnp.arange(num_tokens, dtype=jnp.int32)
    hidden = state.hidden[:num_tokens].astype(jnp.float32)
    is_first = (state.seq_len[rows] == lengths)[:, None]
    old, is_own = state.pooled[rows], (token >= starts[:, None]) & (token < ends[:, None])
    if mode == "cls":
        new = jnp.where(is_first, hidden[starts], old)
    elif mode == "max":
        # The first row that ends after it; padding has none.
        owner = (ends <= token[:, None]).sum(axis=1, dtype=jnp.int32)
        highest = jax.ops.segment_max(hidden, owner, num_rows)
        new = jnp.maximum(jnp.where(is_first, -jnp.inf, old), highest)
    else:
        # As a product, whose order of summation is fixed; one row's NaN must not reach another.
        is_finite = jnp.isfinite(hidden).all(axis=1)
        total = jnp.einsum(
            "rt,td->rd",
            is_own.astype(jnp.float32),
            jnp.where(is_finite[:, None], hidden, 0),
            precision=jax.lax.Precision.HIGHEST,
        )
        is_sound = ~(is_own & ~is_finite).any(axis=1)
        new = jnp.where(is_first, 0, old) + jnp.where(is_sound[:, None], total, jnp.nan)
    return dataclasses.replace(state, pooled=state.pooled.at[rows].set(new))


def pool(
    merge: Merge, pooling: PoolingConfig, num_rows: int, weights: Weights, state: State
) -> State:
    """Gives each of an extend step's sampling rows its vector, and no token.

    In the place of a token stands the sum of the vector's bits: a replay compares that.
    """
    rows = state.sampling_rows[:num_rows]
    if pooling.needs_all_tokens:
        count = state.seq_len[rows, None] if pooling.mode == "mean" else 1
        hidden = state.pooled[rows] / jnp.maximum(count, 1)
    else:
        tokens = state.sampling_tokens[:num_rows]
        if pooling.mode == "cls":  # all of the text is in this step
            tokens = tokens - (state.seq_len[rows] - 1)
        hidden = state.hidden[tokens]
    model = merge(weights)
    vectors = rowwise(model, functools.partial(vectors_of, model, pooling), hidden)
    finish = jnp.where(jnp.isfinite(vectors).all(axis=-1), OUT_OF_LENGTH, NOT_FINITE)
    finish = jnp.where(rows == len(state.batch), STOPPED, finish).astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(vectors, jnp.int32).sum(axis=-1, dtype=jnp.int32)
    drawn = jnp.stack([bits, finish, jnp.zeros_like(bits)], axis=-1)
    return dataclasses.replace(
        state,
        finish=state.finish.at[rows].set(finish),
        pooled=state.pooled.at[rows].set(vectors),
        out=state.out.at[0, rows].set(drawn),
    )


def score(
    merge: Merge,
    wants_tops: bool,
    weights: Weights,
    state: State,
    upload: Int32[Array, "S 3"],
) -> Int32[Array, "S scores"]:
    """Logprobs of prompt tokens after an extend step: of each line of `StepPlan.scores` the
    logprob as float bits and, where wanted, a line of tops. Changes nothing.

    The scores are the model's own: no temperature, bias or penalty.
    """
    tokens, targets, rows = upload.T
    model = merge(weights)
    logprobs = rowwise(model, jax.nn.log_softmax, model.logits(state.hidden[tokens]))
    chosen = sampling_ops.logprobs_of(logprobs, targets)
    packed = jax.lax.bitcast_convert_type(chosen, jnp.int32)[:, None]
    if not wants_tops:
        return packed
    has_extras = sampling_ops.Rows.unpack(state.sampling[rows]).has_extras
    extras = sampling_ops.Extras.unpack(state.extras[rows], has_extras)
    return jnp.concatenate([packed, sampling_ops.pack_tops(logprobs, extras.probe_ids)], axis=1)


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
            step=step,
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


def peek(leaf: Num[Array, "*sizes"]) -> Num[Array, "*sizes"]:
    """A fresh copy: a donated array cannot be read once the next program has taken it."""
    return leaf + 0


def peek_experts(num_tokens: int, expert_ids: Int16[Array, "N L k"]) -> Int16[Array, "n L k"]:
    """A copy of the first ones."""
    return expert_ids[:num_tokens] + 0


def _overwrite(old: Int32[Array, " R"], new: Int32[Array, " R"]) -> Int32[Array, " R"]:
    """`new`, where `old` is. A leaf that is replaced unread would be no argument of the program:
    its buffer would go to another leaf of its shape, addresses would change, graphs be patched."""
    return jax.lax.dynamic_update_slice(old, new, (0,))


def _run_model(
    model: Embedder,
    attention: str | None,
    state: State,
    tokens,
    positions,
    *,
    is_live,
    owner,
    batch,
    step: jax.Array | int = 0,
) -> tuple[State, Float[Array, "T D"]]:
    """The packed tokens' hidden states; their keys and values go to their rows' pages, those of
    tokens that are not live to the trash page. Their experts are noted as those of this step of
    the dispatch."""
    if state.kv is None:
        hidden, _ = model(tokens, positions, PackedAttention.of(batch.query_start_loc, is_live))
        return state, hidden
    page_size = state.kv.page_size
    slots = state.page_table[owner, positions // page_size] * page_size + positions % page_size
    slots = jnp.where(is_live, slots, 0)
    attend = PagedAttention.of(state.kv, slots, batch, implementation=attention)
    hidden, attend = model(tokens, positions, attend)
    state = dataclasses.replace(state, kv=attend.cache)
    if state.expert_ids is not None:
        expert_ids = jnp.where(is_live[:, None, None], attend.expert_ids, -1)
        start = step * len(tokens)
        noted = jax.lax.dynamic_update_slice(state.expert_ids, expert_ids, (start, 0, 0))
        state = dataclasses.replace(state, expert_ids=noted)
    return state, hidden


def _sample_rows(
    model: CausalLM, sampler: Sampler, state: State, rows, hidden: Float[Array, "B D"], step
) -> State:
    """Draws the next token of each row and decides whether it was its last."""
    logits: Float[Array, "B V"] = model.logits(hidden)
    tokens, logprobs, state = SAMPLE[sampler](model, logits, state, rows, step)
    # A logprob is that of the scaled and adjusted scores, of which some are -inf on purpose.
    is_finite = jnp.isfinite(logits).all(axis=-1) & jnp.isfinite(logprobs)
    is_stop = (tokens[:, None] == state.stop_ids[rows]).any(axis=-1)
    finish = jnp.select(
        [~is_finite, is_stop, state.seq_len[rows] >= state.limit[rows]],
        [NOT_FINITE, STOPPED, OUT_OF_LENGTH],
        RUNNING,
    ).astype(jnp.int32)
    finish = jnp.where(rows == len(state.batch), STOPPED, finish)  # the trash row never runs
    bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
    return dataclasses.replace(
        state,
        last_token=state.last_token.at[rows].set(tokens),
        finish=state.finish.at[rows].set(finish),
        out=state.out.at[step, rows].set(jnp.stack([tokens, finish, bits], axis=-1)),
    )


def _greedy(model: CausalLM, logits, state: State, rows, step):
    """Tokens; no logprobs, but zeros."""
    tokens = sampling_ops.greedy(logits)
    return tokens, jnp.zeros(len(tokens), jnp.float32), state


def _plain(model: CausalLM, logits, state: State, rows, step):
    sampling = sampling_ops.Rows.unpack(state.sampling[rows])
    scaled = rowwise(model, sampling_ops.scale, logits, sampling)
    tokens = rowwise(model, sampling_ops.draw, scaled, sampling, state.seq_len[rows])
    logprobs = rowwise(model, jax.nn.log_softmax, scaled)
    return tokens, sampling_ops.logprobs_of(logprobs, tokens), state


def _full(model: CausalLM, logits, state: State, rows, step):
    """As `_plain`, with every option; counts what it has drawn."""
    sampling, positions = sampling_ops.Rows.unpack(state.sampling[rows]), state.seq_len[rows]
    extras = sampling_ops.Extras.unpack(state.extras[rows], sampling.has_extras)
    counts = state.counts[rows]
    logits = rowwise(model, sampling_ops.adjust, logits, counts, sampling, extras, positions)
    scaled = rowwise(model, sampling_ops.scale, logits, sampling)
    kept = rowwise(model, sampling_ops.keep_top, scaled, sampling)
    tokens = rowwise(model, sampling_ops.draw, kept, sampling, positions)
    logprobs = rowwise(model, jax.nn.log_softmax, scaled)
    state = dataclasses.replace(
        state,
        counts=state.counts.at[rows, tokens].add(1),
        tops=state.tops.at[step, rows].set(sampling_ops.pack_tops(logprobs, extras.probe_ids)),
    )
    return tokens, sampling_ops.logprobs_of(logprobs, tokens), state


SAMPLE = {"greedy": _greedy, "plain": _plain, "full": _full}

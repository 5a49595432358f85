"""From scores to tokens and their logprobs, inside jit. Random numbers depend on (seed, position)
alone, and nothing depends on a row's neighbours in the batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.models import scores
from jaxserve.step_plan import EXTRAS_PARTS, NO_TOKEN, TOPS_PARTS

NEVER = -jnp.inf


class Rows(NamedTuple):
    """How each row is sampled, as `step_plan.pack_sampling` packs it."""

    temperature: Float[Array, " B"]  # 0: the best token
    top_p: Float[Array, " B"]
    top_k: Int32[Array, " B"]  # -1: all
    seed: Int32[Array, "B 2"]
    min_p: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    min_len: Int32[Array, " B"]  # tokens before which nothing may stop
    has_extras: Bool[Array, " B"]

    @classmethod
    def unpack(cls, packed: Int32[Array, "B 11"]) -> "Rows":
        floats = jax.lax.bitcast_convert_type(packed, jnp.float32)
        return cls(
            temperature=floats[:, 0],
            top_p=floats[:, 1],
            top_k=packed[:, 2],
            seed=packed[:, 3:5],
            min_p=floats[:, 5],
            frequency_penalty=floats[:, 6],
            presence_penalty=floats[:, 7],
            repetition_penalty=floats[:, 8],
            min_len=packed[:, 9],
            has_extras=packed[:, 10] > 0,
        )


class Extras(NamedTuple):
    """What only some rows ask for, as `step_plan.pack_extras` packs it."""

    bias_ids: Int32[Array, "B biases"]
    biases: Float[Array, "B biases"]
    banned_ids: Int32[Array, "B banned"]  # before `Rows.min_len`
    probe_ids: Int32[Array, "B probes"]  # whose logprobs are asked for

    @classmethod
    def unpack(cls, packed: Int32[Array, "B extras"], has_extras: Bool[Array, " B"]) -> "Extras":
        """Of rows without extras nothing is taken: an earlier request has left them there."""
        ends = [sum(EXTRAS_PARTS[: i + 1]) for i in range(len(EXTRAS_PARTS) - 1)]
        ids, biases, banned, probes = jnp.split(packed, ends, axis=1)
        ids, banned, probes = (
            jnp.where(has_extras[:, None], one, NO_TOKEN) for one in (ids, banned, probes)
        )
        return cls(ids, jax.lax.bitcast_convert_type(biases, jnp.float32), banned, probes)


def greedy(logits: Float[Array, "B V"]) -> Int32[Array, " B"]:
    """The best token of each row, the first of equals; any of a row with NaN."""
    if jax.default_backend() != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA's CPU computes an argmax element by element; two plain reductions take an eighth of that.
    vocab_size = logits.shape[-1]
    is_best = logits == logits.max(axis=-1, keepdims=True)
    ids = jnp.where(is_best, jnp.arange(vocab_size, dtype=jnp.int32), vocab_size - 1)
    return ids.min(axis=-1)


def adjust(
    logits: Float[Array, "B V"],
    counts: Int32[Array, "B V"],
    rows: Rows,
    extras: Extras,
    positions: Int32[Array, " B"],
) -> Float[Array, "B V"]:
    """Bias, penalties for tokens that have come, and no stop before the least length.

    Args:
      counts: how often each token is in the output so far.
      positions: of the token to draw, in its sequence.
    """
    line = jnp.arange(len(logits))[:, None]
    has_come = counts > 0
    repetition = rows.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(has_come, penalised, logits)
    logits -= rows.frequency_penalty[:, None] * counts
    logits -= jnp.where(has_come, rows.presence_penalty[:, None], 0)
    logits = logits.at[line, extras.bias_ids].add(extras.biases, mode="drop")
    is_short = (positions < rows.min_len)[:, None]
    banned = jnp.where(is_short, extras.banned_ids, NO_TOKEN)
    return logits.at[line, banned].set(NEVER, mode="drop")


def scale(logits: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """By each row's temperature, as in training."""
    return scores.scale(logits, rows.temperature)


def draw(
    scaled: Float[Array, "B V"], rows: Rows, positions: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """A token of each row from the softmax of its scores; the best one of greedy rows."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(
        row_keys(rows.seed, positions)
    )
    drawn = greedy(scaled + noise)  # Gumbel-max draws from softmax
    is_greedy = (rows.temperature == 0) | (rows.top_k == 1)
    return jnp.where(is_greedy, greedy(scaled), drawn)


def keep_top(scaled: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """The scores of the tokens that may be drawn, -inf for the others.

    Those may that are among the k most likely, before which less than p mass lies, and that are
    not less likely than min_p times the best; all three cut the full distribution. A token is cut
    by the mass *before* it, so the most likely one always stays. Ties at a boundary stay together.
    """
    vocab_size = scaled.shape[-1]
    top_k, top_p = rows.top_k[:, None], rows.top_p[:, None]
    ordered = -jnp.sort(-scaled, axis=-1)
    mass = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    most = jnp.where(top_k < 0, vocab_size, top_k)
    is_kept = (jnp.arange(vocab_size) < most) & ((before <= top_p) | (top_p >= 1))
    lowest = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True)
    lowest = jnp.maximum(lowest, ordered[:, :1] + jnp.log(rows.min_p)[:, None])
    return jnp.where(scaled >= lowest, scaled, NEVER)


def logprobs_of(logprobs: Float[Array, "B V"], tokens: Int32[Array, " B"]) -> Float[Array, " B"]:
    """Of one token a row."""
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def pack_tops(
    logprobs: Float[Array, "B V"], probe_ids: Int32[Array, "B probes"]
) -> Int32[Array, "B tops"]:
    """A line of tops for each row: `step_plan.TOPS_PARTS`."""
    most = TOPS_PARTS[0]
    values, ids = jax.lax.top_k(logprobs, min(most, logprobs.shape[-1]))
    padding = ((0, 0), (0, most - ids.shape[-1]))
    values = jnp.pad(values, padding, constant_values=NEVER)
    ids = jnp.pad(ids.astype(jnp.int32), padding)
    line = jnp.arange(len(logprobs))[:, None]
    probes = logprobs.at[line, probe_ids].get(mode="fill", fill_value=NEVER)
    bits = jax.lax.bitcast_convert_type(jnp.concatenate([values, probes], axis=1), jnp.int32)
    return jnp.concatenate([ids, bits], axis=1)


def row_keys(seeds: Int32[Array, "B 2"], positions: Int32[Array, " B"]) -> jax.Array:
    """A key from all 64 bits of each row's seed and the position."""
    bits = jax.lax.bitcast_convert_type(seeds, jnp.uint32)
    keys = jax.random.wrap_key_data(bits, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, positions)

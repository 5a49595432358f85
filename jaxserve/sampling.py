"""From scores to tokens, inside jit. Random numbers depend on (seed, position) alone, so a token
does not depend on its neighbours in the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

NEVER = -jnp.inf


def greedy(logits: Float[Array, "B V"]) -> Int32[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(
    logits: Float[Array, "B V"], sampling: Int32[Array, "B 8"], positions: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """Temperature, then top-k and top-p together on the full distribution; temperature 0 is greedy.

    Args:
      sampling: as `step_plan.pack_sampling` packs it.
      positions: of the token to draw, in its sequence.
    """
    floats = jax.lax.bitcast_convert_type(sampling[:, :2], jnp.float32)
    temperature, top_p, top_k = floats[:, 0], floats[:, 1], sampling[:, 2]
    scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
    kept = jnp.where(keep_top(scaled, top_k, top_p), scaled, NEVER)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(
        row_keys(sampling[:, 3:5], positions)
    )
    drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)  # Gumbel-max draws from softmax
    return jnp.where(temperature > 0, drawn, greedy(logits))


def keep_top(
    logits: Float[Array, "B V"], top_k: Int32[Array, " B"], top_p: Float[Array, " B"]
) -> Bool[Array, "B V"]:
    """The k most likely tokens (-1 for all) of those before which less than p mass lies.

    A token is cut by the mass *before* it, so the most likely one always stays. Ties at a boundary
    stay together.
    """
    vocab_size = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    mass = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    rank = jnp.arange(vocab_size)
    most = jnp.where(top_k < 0, vocab_size, top_k)[:, None]
    is_kept = (rank < most) & ((before <= top_p[:, None]) | (top_p[:, None] >= 1))
    lowest = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1)
    return logits >= lowest[:, None]


def row_keys(seeds: Int32[Array, "B 2"], positions: Int32[Array, " B"]) -> jax.Array:
    """A key from all 64 bits of each row's seed and the position."""
    bits = jax.lax.bitcast_convert_type(seeds, jnp.uint32)
    keys = jax.random.wrap_key_data(bits, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, positions)

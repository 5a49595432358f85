"""Scores of the vocabulary as a softmax takes them, in serving and in training: the deterministic
mode wants the same bits of both."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def scale(scores: Float[Array, "B V"], temperature: Float[Array, " B"]) -> Float[Array, "B V"]:
    """By each row's temperature, so that the best is 0; 0, which takes the best token, means 1.

    A compiler may round a division in two ways in one program. Of a score far from 0 the softmax
    would take one from the other: at 1e7 they are 1 apart. The gradient has the best score as a
    constant, which a softmax does not depend on.
    """
    best = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    return (scores - best) / jnp.where(temperature > 0, temperature, 1)[:, None]

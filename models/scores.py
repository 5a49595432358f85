"""Scores of the vocabulary as a softmax takes them, in serving and in training: the deterministic
mode wants the same bits of both."""

from jaxtyping import Array, Float


def scale(scores: Float[Array, "B V"], temperature: Float[Array, " B"]) -> Float[Array, "B V"]:
    """By each row's temperature, so that the best is 0.

    A compiler may round a division in two ways in one program. Of a score far from 0 the softmax
    would take one from the other: at 1e7 they are 1 apart.
    """
    return (scores - scores.max(axis=-1, keepdims=True)) / temperature[:, None]

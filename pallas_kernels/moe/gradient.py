"""The gradient of the experts, whichever implementation computed them: by the same tiles, so that
its cost follows the tokens too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.moe.dispatch import Dispatch
from pallas_kernels.moe.reference import swiglu


def pull_back(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    weights: Float[Array, "T k"],
    dispatch: Dispatch,
    grad: Float[Array, "T D"],
) -> tuple[
    Float[Array, "T D"], Float[Array, "E 2 F D"], Float[Array, "E D F"], Float[Array, "T k"]
]:
    """The gradients of x, gate_up, down and weights, where `grad` is that of the result."""
    choices = weights.shape[1]

    def weighted(rows, gate_up, down, weights):
        return swiglu(rows, gate_up, down) * weights[:, None].astype(jnp.float32)

    def take(array, index):  # zeros where a place holds no pair
        return array.at[index].get(mode="fill", fill_value=0)

    def add_tile(tile, grads):
        by_x, by_gate_up, by_down, by_weights = grads
        expert, pair = dispatch.expert[tile], dispatch.pair[tile]
        token, choice = pair // choices, pair % choices
        weight = weights.at[token, choice].get(mode="fill", fill_value=0)
        _, pull = jax.vjp(weighted, take(x, token), gate_up[expert], down[expert], weight)
        of_rows, of_gate_up, of_down, of_weight = pull(take(grad, token).astype(jnp.float32))
        return (
            by_x.at[token].add(of_rows, mode="drop"),
            by_gate_up.at[expert].add(of_gate_up),
            by_down.at[expert].add(of_down),
            by_weights.at[token, choice].set(of_weight, mode="drop"),
        )

    operands = x, gate_up, down, weights
    grads = tuple(jnp.zeros(operand.shape, jnp.float32) for operand in operands)
    grads = jax.lax.fori_loop(0, dispatch.num_tiles, add_tile, grads)
    return tuple(g.astype(operand.dtype) for g, operand in zip(grads, operands, strict=True))

"""The forward pass for training, of the modules that serve: whole sequences, differentiable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxserve.models.interface import CausalAttention, CausalLM


def forward(
    model: CausalLM, tokens: Int32[Array, "B L"], lengths: Int32[Array, " B"] | None = None
) -> Float[Array, "B L V"]:
    """Scores of the token after each of a batch of sequences, all beginning at position 0.

    Args:
      model: `nnx.merge(graphdef, params)`; gradients flow to `params`.
      lengths: of the sequences, beyond which nothing is meant: causal, what follows a token does
        not change its scores, so they are optional.
    """
    num_rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (num_rows, length))
    is_live = None if lengths is None else positions < lengths[:, None]
    # Flat, not under vmap: a row's tokens would not share their experts with another's.
    attend = CausalAttention(
        is_live=None if is_live is None else is_live.reshape(-1), num_rows=num_rows
    )
    hidden, _ = model(tokens.reshape(-1), positions.reshape(-1), attend)
    logits = model.logits(hidden).reshape(num_rows, length, -1)
    return logits if is_live is None else jnp.where(is_live[..., None], logits, 0)


def token_logprobs(
    model: CausalLM, tokens: Int32[Array, "B L"], temperature: Float[Array, " B"] | float = 1.0
) -> Float[Array, "B L-1"]:
    """The logprob of each token but the first, as the server tells it: of scores over temperature.

    What a policy gradient needs: sum it over the tokens that were sampled.
    """
    logits = forward(model, tokens[:, :-1])
    scaled = logits / jnp.asarray(temperature, jnp.float32).reshape(-1, 1, 1)
    chosen = jnp.take_along_axis(scaled, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)

"""Which experts a token takes, and with what weights: the routers of all mixtures of experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxserve.models.moe_config import Routing


def route(
    logits: Float[Array, "T E"], routing: Routing, correction_bias: Float[Array, " E"] | None = None
) -> tuple[Float[Array, "T k"], Int32[Array, "T k"]]:
    """The weights, in float32, and the experts of each token, the best first; of equals the lower.

    Args:
      correction_bias: added to the scores for the choice alone, not for the weights
        (https://arxiv.org/abs/2408.15664).
    """
    logits = logits.astype(jnp.float32)
    score = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[routing.scoring]
    scores = score(logits)
    wanted = scores if correction_bias is None else scores + correction_bias.astype(jnp.float32)
    if routing.num_groups > 1:
        wanted = _keep_best_groups(wanted, routing)
    _, expert_ids = jax.lax.top_k(wanted, routing.top_k)
    weights = jnp.take_along_axis(scores, expert_ids, axis=1)
    if routing.norm_topk_prob:
        weights /= weights.sum(axis=1, keepdims=True) + 1e-20
    return weights * routing.scale, expert_ids


def _keep_best_groups(scores: Float[Array, "T E"], routing: Routing) -> Float[Array, "T E"]:
    groups = scores.reshape(len(scores), routing.num_groups, -1)
    worth = jax.lax.top_k(groups, routing.group_top)[0].sum(axis=-1)
    _, best = jax.lax.top_k(worth, routing.top_groups)
    is_best = (best[:, :, None] == jnp.arange(routing.num_groups)).any(axis=1)
    return jnp.where(is_best[:, :, None], groups, -jnp.inf).reshape(scores.shape)

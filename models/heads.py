"""What stands in the place of the token predicting head in a model that answers with vectors."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxserve.models.interface import Attend, Embedder
from jaxserve.models.layers import Linear, project
from jaxserve.models.pooling import HeadKind, PoolingConfig

LEAST_NORM = 1e-12  # as torch.nn.functional.normalize has it


class ScoreHead(Linear):
    """One matrix, as `*ForSequenceClassification` has it."""

    def __init__(self, hidden_size: int, num_labels: int, *, dtype):
        super().__init__(hidden_size, num_labels, dtype=dtype, axes=(None, None))

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B S"]:
        return project32(self, hidden)


class RewardHead(nnx.Module):
    """Two layers with biases, `0` and `2` around a ReLU (https://arxiv.org/abs/2409.12122)."""

    def __init__(self, hidden_size: int, num_labels: int, *, dtype):
        options = {"dtype": dtype, "axes": (None, None), "bias": True}
        setattr(self, "0", Linear(hidden_size, hidden_size, **options))
        setattr(self, "2", Linear(hidden_size, num_labels, **options))

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B S"]:
        inner = jax.nn.relu(project32(getattr(self, "0"), hidden))
        return project32(getattr(self, "2"), inner)


HEADS: dict[HeadKind, type[ScoreHead] | type[RewardHead]] = {
    "score": ScoreHead,
    "reward": RewardHead,
}


class PooledModel(nnx.Module):
    """A decoder's backbone under the name that a checkpoint gives it, and a head or none."""

    def __init__(self, backbone: nnx.Module, pooling: PoolingConfig, hidden_size: int, *, dtype):
        self.model = backbone
        if pooling.head is not None:
            self.score = HEADS[pooling.head](hidden_size, pooling.size, dtype=dtype)

    def __call__[A: Attend](
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: A
    ) -> tuple[Float[Array, "T D"], A]:
        return self.model(tokens, positions, attend)

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B S"]:
        return self.score.scores(hidden)


def vectors_of(
    model: Embedder, pooling: PoolingConfig, hidden: Float[Array, "B D"]
) -> Float[Array, "B W"]:
    """In float32, of the hidden states that texts are pooled to."""
    if pooling.head is not None:
        return model.scores(hidden)
    vectors = hidden.astype(jnp.float32)
    if not pooling.is_normalized:
        return vectors
    norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.maximum(norm, LEAST_NORM)


def project32(linear: Linear, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
    """Of a few rows: the products and their sum in float32, whatever the weights are stored in."""
    weight = linear.weight[...].astype(jnp.float32)
    y = project(x.astype(jnp.float32), weight, jnp.float32)
    return y if linear.bias is None else y + linear.bias[...].astype(jnp.float32)

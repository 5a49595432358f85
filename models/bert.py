"""BERT (https://arxiv.org/abs/1810.04805): an encoder, and the classifier over its first token.

A token of a pair's second text arrives as its id plus `vocab_size`: so a token's type travels with
its id, and nothing between the request and this file knows of types.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxserve.models.config import ModelConfig, number, size
from jaxserve.models.encoder_config import EncoderConfig
from jaxserve.models.heads import project32
from jaxserve.models.interface import Attend
from jaxserve.models.layers import Embedding, FusedLinear, Linear, param

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class LayerNorm(nnx.Module):
    """https://arxiv.org/abs/1607.06450"""

    def __init__(self, size: int, *, eps: float, dtype):
        self.weight = param(size, dtype=dtype, kind="norm", axes=(None,))
        self.bias = param(size, dtype=dtype, kind="bias", axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        x32 = x.astype(jnp.float32)
        x32 -= x32.mean(axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt((x32**2).mean(axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * x32.astype(x.dtype) + self.bias[...]


class Embeddings(nnx.Module):
    def __init__(self, c: ModelConfig, dtype):
        make = functools.partial(Embedding, size=c.hidden_size, dtype=dtype)
        self.word_embeddings = make(c.vocab_size)
        self.position_embeddings = make(c.encoder.num_positions)
        self.token_type_embeddings = make(c.encoder.num_token_types)
        self.LayerNorm = LayerNorm(c.hidden_size, eps=c.encoder.norm_eps, dtype=dtype)
        self.vocab_size, self.first_position = c.vocab_size, c.encoder.first_position

    def __call__(
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"]
    ) -> Float[Array, "T D"]:
        types, ids = tokens // self.vocab_size, tokens % self.vocab_size
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        return self.LayerNorm(x + self.position_embeddings(positions + self.first_position))


class SelfAttention(nnx.Module):
    """q, k and v are one matrix, grouped by head: `[N, q + k + v, H, D]`."""

    def __init__(self, c: ModelConfig, dtype):
        names = ("query", "key", "value")
        self.qkv = FusedLinear(
            c.hidden_size,
            (c.num_heads, len(names), c.head_dim),
            parts=tuple((name, (slice(None), slice(i, i + 1))) for i, name in enumerate(names)),
            dtype=dtype,
            axes=("kv_heads", None, None),
            bias=True,
        )

    def __call__[A: Attend](
        self, x: Float[Array, "T D"], attend: A, layer: Int32[Array, ""]
    ) -> tuple[Float[Array, "T D"], A]:
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        out, attend = attend(layer, q, k, v, window=None)
        return out.reshape(len(x), -1), attend


class Output(nnx.Module):
    """The end of half a layer: a projection, added to what came in, and normalised."""

    def __init__(self, c: ModelConfig, in_size: int, in_axis: str, dtype):
        axes = (None, in_axis)
        self.dense = Linear(in_size, c.hidden_size, dtype=dtype, axes=axes, bias=True)
        self.LayerNorm = LayerNorm(c.hidden_size, eps=c.encoder.norm_eps, dtype=dtype)

    def __call__(self, inner: Float[Array, "T I"], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.LayerNorm(self.dense(inner) + x)


class EncoderLayer(nnx.Module):
    def __init__(self, c: ModelConfig, dtype):
        self.attention, self.intermediate = nnx.Module(), nnx.Module()
        self.attention.self = SelfAttention(c, dtype)
        self.attention.output = Output(c, c.num_heads * c.head_dim, "heads", dtype)
        self.intermediate.dense = Linear(
            c.hidden_size, c.intermediate_size, dtype=dtype, axes=("mlp", None), bias=True
        )
        self.output = Output(c, c.intermediate_size, "mlp", dtype)
        self.activation = c.encoder.activation

    def __call__[A: Attend](
        self, x: Float[Array, "T D"], attend: A, layer: Int32[Array, ""]
    ) -> tuple[Float[Array, "T D"], A]:
        attended, attend = self.attention.self(x, attend, layer)
        x = self.attention.output(attended, x)
        inner = ACTIVATIONS[self.activation](self.intermediate.dense(x))
        return self.output(inner, x), attend


run_layer = jax.jit(EncoderLayer.__call__)  # as in llama.py


class BertModel(nnx.Module):
    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        return encoder_fields(raw, config, first_position=0)

    def __init__(self, c: ModelConfig, dtype, *, has_pooler: bool = False):
        self.embeddings = Embeddings(c, dtype)
        self.encoder = nnx.Module()
        self.encoder.layer = nnx.List([EncoderLayer(c, dtype) for _ in range(c.num_layers)])
        if has_pooler:
            self.pooler = nnx.Module()
            self.pooler.dense = square(c.hidden_size, dtype)

    @staticmethod
    def with_head(c: ModelConfig, dtype) -> nnx.Module:
        return BertWithHead(c, dtype)

    def __call__[A: Attend](
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: A
    ) -> tuple[Float[Array, "T D"], A]:
        x = self.embeddings(tokens, positions)
        for i, layer in enumerate(self.encoder.layer):
            x, attend = run_layer(layer, x, attend, jnp.int32(i))
        return x, attend


class BertWithHead(nnx.Module):
    """An encoder under the name that a checkpoint gives it, and its classifier or none."""

    def __init__(self, c: ModelConfig, dtype):
        has_head = c.pooling.head is not None
        self.bert = BertModel(c, dtype, has_pooler=has_head)
        if has_head:
            self.classifier = label_layer(c, dtype)

    def __call__[A: Attend](
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: A
    ) -> tuple[Float[Array, "T D"], A]:
        return self.bert(tokens, positions, attend)

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B S"]:
        pooled = jnp.tanh(project32(self.bert.pooler.dense, hidden))
        return project32(self.classifier, pooled)


def encoder_fields(
    raw: Mapping[str, Any], config: ModelConfig, *, first_position: int
) -> dict[str, Any]:
    """The fields of ModelConfig that an encoder reads in its own way.

    Raises ValueError for what is not served; names the key or the flag.
    """
    activation = raw.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"config.json: hidden_act {activation!r} is not served; known: {known}")
    if (kind := raw.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"config.json: position_embedding_type {kind!r}: only absolute is served")
    if raw.get("is_decoder"):
        raise ValueError("config.json: is_decoder: only encoders of this architecture are served")
    longest = size(raw, "max_position_embeddings", 512)
    if config.context_length > longest or first_position >= longest:
        raise ValueError(
            f"--context-length {config.context_length}: the model has learned "
            f"{max(longest - first_position, 0)} positions"
        )
    return {
        "context_length": min(config.context_length, longest - first_position),
        # As transformers has it where nothing is said.
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
        "encoder": EncoderConfig(
            num_positions=longest,
            first_position=first_position,
            num_token_types=size(raw, "type_vocab_size", 2),
            activation=activation,
            norm_eps=number(raw, "layer_norm_eps", 1e-12),
        ),
    }


def square(hidden_size: int, dtype) -> Linear:
    return Linear(hidden_size, hidden_size, dtype=dtype, axes=(None, None), bias=True)


def label_layer(c: ModelConfig, dtype) -> Linear:
    return Linear(c.hidden_size, c.pooling.size, dtype=dtype, axes=(None, None), bias=True)

"""Llama 2 and 3 (https://arxiv.org/abs/2407.21783), and the body of every decoder that is built
like it: their files say only where they differ."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.models.config import ModelConfig, flag
from jaxserve.models.interface import Attend
from jaxserve.models.layers import (
    Attention,
    Embedding,
    GatedMLP,
    Linear,
    QkNorm,
    RMSNorm,
    project,
)
from jaxserve.models.rope import Rope, rope_tables


class DecoderLayer(nnx.Module):
    mlp_name = "mlp"  # in the checkpoint

    def __init__(self, c: ModelConfig, dtype, *, number: int, qk_norm: QkNorm | None):
        self.self_attn = Attention(c, dtype, window=c.windows[number], qk_norm=qk_norm)
        setattr(self, self.mlp_name, self.make_mlp(c, dtype, number))
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)

    def make_mlp(self, c: ModelConfig, dtype, number: int) -> nnx.Module:
        return GatedMLP(c, dtype)

    def feed_forward(
        self, x: Float[Array, "T D"], is_live: Bool[Array, " T"] | None
    ) -> tuple[Float[Array, "T D"], Int32[Array, "T k"] | None]:
        """The MLP's result and, of one with experts, whose it is."""
        return self.mlp(x), None

    def __call__[A: Attend](
        self, x: Float[Array, "T D"], rope: Rope, attend: A, layer: Int32[Array, ""]
    ) -> tuple[Float[Array, "T D"], A, Int32[Array, "T k"] | None]:
        attended, attend = self.self_attn(self.input_layernorm(x), rope, attend, layer)
        x = x + attended
        out, expert_ids = self.feed_forward(self.post_attention_layernorm(x), attend.is_live)
        return x + out, attend, expert_ids


# Traced once for all layers of one kind: unrolled layers run fastest, but tracing 32 of them does
# not.
run_layer = jax.jit(DecoderLayer.__call__)


class Backbone(nnx.Module):
    def __init__(
        self, c: ModelConfig, dtype, *, layer_class: type[DecoderLayer], qk_norm: QkNorm | None
    ):
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
        self.layers = nnx.List(
            [layer_class(c, dtype, number=i, qk_norm=qk_norm) for i in range(c.num_layers)]
        )
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)
        self.config = c

    def __call__[A: Attend](
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: A
    ) -> tuple[Float[Array, "T D"], A]:
        x, rope = self.embed_tokens(tokens), rope_tables(self.config, positions)
        chosen = []
        for i, layer in enumerate(self.layers):
            x, attend, expert_ids = run_layer(layer, x, rope, attend, jnp.int32(i))
            chosen.append(expert_ids)
        attend = attend.note_experts([ids for ids in chosen if ids is not None])
        return self.norm(x), attend


class LlamaForCausalLM(nnx.Module):
    layer_class = DecoderLayer
    qk_norm: QkNorm | None = None

    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """The fields of ModelConfig that this architecture reads in its own way."""
        bias = flag(raw, "attention_bias")
        return {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "mlp_bias": flag(raw, "mlp_bias"),
        }

    def __init__(self, c: ModelConfig, dtype):
        self.model = Backbone(c, dtype, layer_class=self.layer_class, qk_norm=self.qk_norm)
        self.lm_head = (
            None
            if c.tie_word_embeddings
            else Linear(c.hidden_size, c.vocab_size, dtype=dtype, axes=("vocab", None))
        )

    def __call__[A: Attend](
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: A
    ) -> tuple[Float[Array, "T D"], A]:
        return self.model(tokens, positions, attend)

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return project(hidden, head.weight[...], jnp.float32)

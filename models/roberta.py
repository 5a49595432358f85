"""RoBERTa (https://arxiv.org/abs/1907.11692) and XLM-RoBERTa: BERT whose positions begin behind
that of the padding token, and another classifier."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxserve.models.bert import BertModel, encoder_fields, label_layer, square
from jaxserve.models.config import ModelConfig
from jaxserve.models.heads import project32
from jaxserve.models.interface import Attend


class RobertaModel(BertModel):
    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        padding = raw.get("pad_token_id")
        padding = 1 if padding is None else padding
        if type(padding) is not int or padding < 0:
            raise ValueError(f"config.json: pad_token_id is {padding!r}, needs a token id")
        return encoder_fields(raw, config, first_position=padding + 1)

    @staticmethod
    def with_head(c: ModelConfig, dtype) -> nnx.Module:
        return RobertaWithHead(c, dtype)


XLMRobertaModel = RobertaModel  # more languages, the same model


class Classifier(nnx.Module):
    def __init__(self, c: ModelConfig, dtype):
        self.dense, self.out_proj = square(c.hidden_size, dtype), label_layer(c, dtype)

    def __call__(self, hidden: Float[Array, "B D"]) -> Float[Array, "B S"]:
        return project32(self.out_proj, jnp.tanh(project32(self.dense, hidden)))


class RobertaWithHead(nnx.Module):
    """As `BertWithHead`."""

    def __init__(self, c: ModelConfig, dtype):
        self.roberta = RobertaModel(c, dtype)
        if c.pooling.head is not None:
            self.classifier = Classifier(c, dtype)

    def __call__[A: Attend](
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: A
    ) -> tuple[Float[Array, "T D"], A]:
        return self.roberta(tokens, positions, attend)

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B S"]:
        return self.classifier(hidden)

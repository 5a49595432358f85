"""Architecture name, as in config.json, to the model class; imported on demand."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.heads import PooledModel
from jaxserve.models.pooling import HeadKind

if TYPE_CHECKING:
    from jaxserve.models.config import ModelConfig

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
ENCODERS = {"BertModel": "bert", "RobertaModel": "roberta", "XLMRobertaModel": "roberta"}
# What a name ends with instead of "ForCausalLM", where a decoder answers with vectors.
POOLED_ENDINGS: dict[str, HeadKind | None] = {
    "Model": None,
    "ForSequenceClassification": "score",
    "ForRewardModel": "reward",
}
CLASSIFIER_ENDING = "ForSequenceClassification"  # of an encoder with another head than none


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The first architecture of a config.json that is served.

    Raises:
      ValueError: none is; the message lists those that are.
    """
    named = raw.get("architectures") or []
    for name in named if isinstance(named, list) else []:
        if isinstance(name, str) and (is_encoder(name) or decoder_of(name) in ARCHITECTURES):
            return name
    known = ", ".join(sorted(ARCHITECTURES))
    raise ValueError(
        f"config.json: architectures {named} are not served; known: {known}, those with "
        f"{', '.join(POOLED_ENDINGS)} in place of ForCausalLM; and {', '.join(ENCODERS)}, or with "
        f"{CLASSIFIER_ENDING} in place of Model"
    )


def is_pooled(architecture: str) -> bool:
    """Whether it answers with vectors only."""
    return architecture not in ARCHITECTURES


def is_encoder(architecture: str) -> bool:
    """Whether its tokens see those behind them too."""
    return _encoder_of(architecture) in ENCODERS


def head_of(architecture: str) -> HeadKind | None:
    if is_encoder(architecture):
        return None if architecture in ENCODERS else "classifier"
    return POOLED_ENDINGS[_pooled_ending(architecture)] if is_pooled(architecture) else None


def decoder_of(architecture: str) -> str:
    """The architecture that predicts tokens with the same backbone."""
    ending = _pooled_ending(architecture)
    return architecture.removesuffix(ending) + "ForCausalLM" if ending else architecture


def _pooled_ending(architecture: str) -> str | None:
    """`RewardModel` ends with `Model` too: the longest."""
    endings = (ending for ending in POOLED_ENDINGS if architecture.endswith(ending))
    return max(endings, key=len, default=None)


def _encoder_of(architecture: str) -> str:
    """The architecture without a head, if it is an encoder's."""
    stem = architecture.removesuffix(CLASSIFIER_ENDING)
    return architecture if stem == architecture else stem + "Model"


def model_class(architecture: str) -> type[nnx.Module]:
    """Of the decoder, or of the encoder, whatever its head."""
    if is_encoder(architecture):
        name = _encoder_of(architecture)
        module = ENCODERS[name]
    else:
        name = decoder_of(architecture)
        module = ARCHITECTURES[name]
    return getattr(importlib.import_module(f"jaxserve.models.{module}"), name)


def create_model(
    config: "ModelConfig",
    *,
    dtype: jax.typing.DTypeLike | None = None,
    key: jax.Array | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's structure and its parameters: `model = nnx.merge(graphdef, params)`.

    Args:
      dtype: of the parameters, the checkpoint's unless given.
      key: draws random parameters (`--load-format dummy`, training from scratch); without it the
        parameters are shapes only.
    """
    dtype = jnp.dtype(dtype or config.dtype)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: _build(config, dtype)))
    return graphdef, params if key is None else random_params(params, key)


def _build(config: "ModelConfig", dtype) -> nnx.Module:
    make, pooling = model_class(config.architecture), config.pooling
    if config.encoder is not None and not (pooling is None or pooling.is_bare):
        return make.with_head(config, dtype)
    if config.encoder is not None or pooling is None:
        return make(config, dtype)
    backbone = make(dataclasses.replace(config, tie_word_embeddings=True), dtype).model
    if pooling.is_bare:
        return backbone
    return PooledModel(backbone, pooling, config.hidden_size, dtype=dtype)


def random_params(abstract: nnx.State, key: jax.Array, std: float = 0.02) -> nnx.State:
    """Norms one, biases zero, matrices normal with deviation `std`; one jit, so on the device."""
    leaves, treedef = jax.tree.flatten(abstract)
    variables = jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))
    kinds = [variable.get_metadata()["kind"] for variable in variables]

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(leaves))
        makers = {
            "norm": lambda key, leaf: jnp.ones(leaf.shape, leaf.dtype),
            "bias": lambda key, leaf: jnp.zeros(leaf.shape, leaf.dtype),
            "matrix": lambda key, leaf: std * jax.random.normal(key, leaf.shape, leaf.dtype),
        }
        return [makers[k](key, leaf) for k, key, leaf in zip(kinds, keys, leaves, strict=True)]

    return jax.tree.unflatten(treedef, draw(key))

"""Architecture name, as in config.json, to the model class; imported on demand."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

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


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The first architecture of a config.json that is served.

    Raises:
      ValueError: none is; the message lists those that are.
    """
    named = raw.get("architectures") or []
    for name in named if isinstance(named, list) else []:
        if isinstance(name, str) and name in ARCHITECTURES:
            return name
    known = ", ".join(sorted(ARCHITECTURES))
    raise ValueError(f"config.json: architectures {named} are not served; known: {known}")


def model_class(architecture: str) -> type[nnx.Module]:
    module = importlib.import_module(f"jaxserve.models.{ARCHITECTURES[architecture]}")
    return getattr(module, architecture)


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
    model = model_class(config.architecture)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: model(config, dtype)))
    return graphdef, params if key is None else random_params(params, key)


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

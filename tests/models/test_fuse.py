"""Between tensors under the checkpoint's names and fused parameters, on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.fuse import fuse, is_fused, named_tensors, unfuse
from jaxserve.models.registry import create_model
from jaxserve.models.weights import checkpoint_tensors

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = CONFIG | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "decoder_sparse_step": 2,
}
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module", params=[CONFIG, EXPERTS], ids=["dense", "experts"])
def model(request):
    config = ModelConfig.from_dict(request.param)
    abstract = create_model(config, dtype=jnp.float32)[1]
    params = create_model(config, dtype=jnp.float32, key=jax.random.key(0))[1]
    noise = np.random.default_rng(0)
    return abstract, jax.tree.map(lambda x: x + noise.standard_normal(x.shape), params)


def nested(tensors: dict) -> dict:
    tree: dict = {}
    for name, tensor in tensors.items():
        node = tree
        *path, last = name.split(".")
        for key in path:
            node = node.setdefault(key, {})
        node[last] = tensor
    return tree


def test_tensors_are_those_of_the_checkpoint(model):
    _, params = model
    tensors, expected = unfuse(params), checkpoint_tensors(params)
    assert tensors.keys() == expected.keys()
    assert {f"model.layers.1.self_attn.{name}.bias" for name in QKV} <= tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])


@pytest.mark.parametrize("form", [dict, nested], ids=["names", "nested"])
def test_fusing_is_the_inverse(model, form):
    abstract, params = model
    tree = form(unfuse(params))
    assert not is_fused(tree, abstract)
    for build in (fuse, jax.jit(lambda tensors, _: fuse(tensors, abstract))):
        fused = build(named_tensors(tree), abstract)
        assert is_fused(fused, abstract)
        for ours, given in zip(jax.tree.leaves(fused), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(ours, given)


def test_what_is_not_fused_is_not_copied(model):
    abstract, params = model
    fused = fuse(unfuse(params), abstract)
    kept = {id(leaf) for leaf in jax.tree.leaves(params)}
    shared = [leaf for leaf in jax.tree.leaves(fused) if id(leaf) in kept]
    # Per layer qkv (weight and bias) and gate_up are fused, and the experts; all else stays.
    has_experts = len(abstract["model"]["layers"][1]["mlp"]) > 2
    assert len(shared) == len(kept) - 3 * CONFIG["num_hidden_layers"] - 2 * has_experts


def test_tensors_are_cast_to_the_models_dtype(model):
    abstract, params = model
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract)
    fused = fuse(unfuse(params), abstract)
    assert {leaf.dtype for leaf in jax.tree.leaves(fused)} == {jnp.dtype(jnp.bfloat16)}


def test_all_that_does_not_fit_is_named(model):
    abstract, params = model
    tensors = unfuse(params)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = jnp.zeros(3)
    tensors["model.embed_tokens.weight"] = jnp.zeros((3, 16))
    with pytest.raises(ValueError) as error:
        fuse(tensors, abstract)
    for words in ("missing: model.norm.weight", "not in the model: model.extra", "given [3, 16]"):
        assert words in str(error.value)


def test_gradients_flow_through(model):
    abstract, params = model
    grads = jax.grad(lambda t: sum(jnp.sum(x**2) for x in jax.tree.leaves(fuse(t, abstract))))(
        unfuse(params)
    )
    for name, tensor in unfuse(params).items():
        np.testing.assert_allclose(grads[name], 2 * tensor, rtol=1e-6)


def test_states_and_modules_are_trees_too():
    class Pair(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(jnp.ones(2))
            self.b = nnx.List([nnx.Param(jnp.zeros(3))])

    pair = Pair()
    assert named_tensors(pair).keys() == named_tensors(nnx.state(pair)).keys() == {"a", "b.0"}


def test_a_name_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match=r"a\.b is there twice"):
        named_tensors({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})


def test_a_head_that_is_tied_and_buffers_are_passed_over():
    """As in a checkpoint."""
    config = ModelConfig.from_dict(CONFIG | {"tie_word_embeddings": True})
    abstract = create_model(config, dtype=jnp.float32)[1]
    tensors = unfuse(create_model(config, dtype=jnp.float32, key=jax.random.key(0))[1])
    head = {"lm_head.weight": jnp.zeros((64, 16))}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": jnp.zeros(2)}
    fused = fuse(tensors | head | buffer, abstract)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, fused, fuse(tensors, abstract)))
    with pytest.raises(ValueError, match=r"not in the model: lm_head\.bias"):
        fuse(tensors | {"lm_head.bias": jnp.zeros(64)}, abstract)

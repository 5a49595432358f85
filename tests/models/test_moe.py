"""Models with experts beyond what the goldens compare: padding, counts, training, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import make_step
from jaxserve.models.config import ModelConfig
from jaxserve.models.forward import forward, token_logprobs
from jaxserve.models.interface import CausalAttention
from jaxserve.models.registry import create_model
from jaxserve.models.sharding import param_shardings
from pallas_kernels import moe
from tests.golden.cases import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE

SILENT = {  # what transformers takes where config.json says nothing of experts
    "Qwen2MoeForCausalLM": (60, 4, 1408, 5632, False),
    "Qwen3MoeForCausalLM": (128, 8, 768, 0, False),
    "MixtralForCausalLM": (8, 2, 48, 0, True),
    "OlmoeForCausalLM": (64, 8, 48, 0, False),
}


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_dict(QWEN2_MOE | {"norm_topk_prob": True})
    return nnx.merge(*create_model(config, dtype=jnp.float32, key=jax.random.key(0)))


def random_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, QWEN2_MOE["vocab_size"], jnp.int32)


@pytest.mark.parametrize(
    "base", [QWEN2_MOE, QWEN3_MOE, MIXTRAL, OLMOE], ids=lambda b: b["model_type"]
)
def test_silent_config_gets_the_defaults_of_transformers(base):
    named = {key for key in base if "expert" in key or "moe" in key or key == "norm_topk_prob"}
    config = ModelConfig.from_dict({key: base[key] for key in base if key not in named})
    found = config.moe
    routing = found.routing
    assert (
        found.num_experts,
        routing.top_k,
        found.intermediate_size,
        found.shared_intermediate_size,
        routing.norm_topk_prob,
    ) == SILENT[config.architecture]
    assert found.is_sparse == (True, True)


def test_layers_with_experts():
    def layers(**changes):
        changes = {"num_hidden_layers": 6} | changes
        return ModelConfig.from_dict(QWEN2_MOE | changes).moe.is_sparse

    assert layers(decoder_sparse_step=2) == (False, True) * 3
    assert layers(mlp_only_layers=[0, 4]) == (False, True, True, True, False, True)
    assert layers(decoder_sparse_step=3, mlp_only_layers=[2]) == (False,) * 5 + (True,)


def test_both_spellings_of_the_number_of_experts():
    for base in (QWEN3_MOE, MIXTRAL):
        bare = {k: v for k, v in base.items() if k not in ("num_experts", "num_local_experts")}
        for key in ("num_experts", "num_local_experts"):
            assert ModelConfig.from_dict(bare | {key: 5}).moe.num_experts == 5


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_experts 8"),
        ({"num_experts": 0}, "num_experts is 0, needs a positive integer"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, needs a list of layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, needs true or false"),
        ({"qkv_bias": "yes"}, "qkv_bias is 'yes'"),
    ],
    ids=str,
)
def test_values_that_are_not_served_are_refused(changes, words):
    with pytest.raises(ValueError, match=f"config.json: {words}"):
        ModelConfig.from_dict(QWEN2_MOE | changes)


def test_padding_tokens_change_nothing(model):
    tokens, positions = random_tokens(24), jnp.arange(24)
    is_live = positions < 17
    padded, _ = model(tokens, positions, CausalAttention(is_live=is_live))
    alone, _ = model(tokens[:17], positions[:17], CausalAttention())
    np.testing.assert_allclose(padded[:17], alone, atol=1e-5)


def test_no_padding_token_reaches_an_expert_or_a_count(monkeypatch):
    """While serving: what each layer's dispatch counts, for a batch of which most is padding."""
    counted, make_plan = [], moe.plan

    def counting_plan(x, gate_up, expert_ids, is_live):
        plan = make_plan(x, gate_up, expert_ids, is_live)
        jax.debug.callback(
            lambda sizes: counted.append(int(sizes.sum())), plan.dispatch.group_sizes
        )
        return plan

    monkeypatch.setattr(moe, "plan", counting_plan)
    config = ModelConfig.from_dict(QWEN2_MOE | {"num_experts_per_tok": 3})
    step = make_step(config, max_rows=5, max_len=32, max_tokens=29, dtype="float32")
    params = create_model(config, dtype=jnp.float32, key=jax.random.key(0))[1]
    lengths = jnp.array([4, 0, 1, 0, 6], jnp.int32)
    state, out = step(params, step.init_state(), random_tokens(29), lengths)
    jax.effects_barrier()
    assert counted == [11 * 3] * 2, "two layers, 11 of 29 tokens"
    counted.clear()
    finished = state.finish.at[0].set(1)
    step.decode(params, dataclasses.replace(state, finish=finished))
    jax.effects_barrier()
    print(f"decode: {counted} pairs of 5 rows")
    assert counted == [4 * 3] * 2, "a row that has finished is padding"


def test_forward_of_a_batch_is_that_of_each_sequence(model):
    tokens, lengths = random_tokens(3, 12), jnp.array([12, 7, 1], jnp.int32)
    logits = forward(model, tokens, lengths)
    for row, length in enumerate([12, 7, 1]):
        hidden, _ = model(tokens[row, :length], jnp.arange(length), CausalAttention())
        np.testing.assert_allclose(logits[row, :length], model.logits(hidden), atol=1e-5)
        assert not np.asarray(logits[row, length:]).any()


def test_gradient_is_the_slope_of_the_loss(model):
    graphdef, params = nnx.split(model)
    tokens = random_tokens(2, 16)

    @jax.jit
    def loss(params):
        return -token_logprobs(nnx.merge(graphdef, params), tokens).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    by_path = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradient)}
    for name in ("gate.weight", "experts.gate_up_proj.weight", "experts.down_proj.weight"):
        assert jnp.abs(by_path[f"model.layers.1.mlp.{name}"]).max() > 0, name

    norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    step = 1e-2 / norm

    def at(sign):
        return loss(jax.tree.map(lambda p, g: p + sign * step * g, params, gradient))

    slope = (at(1) - at(-1)) / 2e-2
    print(f"slope along the gradient {slope:.4f}, its norm {norm:.4f}")
    np.testing.assert_allclose(slope, norm, rtol=1e-2)


def test_experts_are_sharded_by_expert():
    config = ModelConfig.from_dict(QWEN3_MOE)
    abstract = create_model(config, dtype=jnp.float32)[1]
    mesh = jax.make_mesh((2,), ("expert",))
    shardings = dict(nnx.to_flat_state(param_shardings(abstract, mesh)))
    cut = {path: s.get_value().spec for path, s in shardings.items() if any(s.get_value().spec)}
    assert {path[-2] for path in cut} == {"gate_up_proj", "down_proj"}
    assert all(spec[0] == "expert" and not any(spec[1:]) for spec in cut.values())

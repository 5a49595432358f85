"""Routers: DeepSeek's against transformers' own; those of whole models are in test_goldens.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.moe_config import Routing
from jaxserve.models.routing import route
from tests.golden.routers.cases import NUM_EXPERTS, ROUTER_CASES, RouterCase


def routing_of(case: RouterCase) -> Routing:
    config, is_v3 = case.config, case.model == "deepseek_v3"
    has_groups = is_v3 or config["topk_method"] == "group_limited_greedy"
    return Routing(
        top_k=config["num_experts_per_tok"],
        scoring="sigmoid" if is_v3 else "softmax",
        norm_topk_prob=is_v3 and config.get("norm_topk_prob", True),
        num_groups=config["n_group"] if has_groups else 1,
        top_groups=config["topk_group"] if has_groups else 1,
        group_top=2 if is_v3 else 1,
        scale=config["routed_scaling_factor"],
    )


def choose(case: RouterCase, routing: Routing, bias=None) -> tuple[np.ndarray, np.ndarray]:
    """As the goldens have them: expert ids, ascending, and their weights."""
    with jax.default_matmul_precision("highest"):
        logits = jnp.asarray(case.hidden()) @ case.weight().T
    weights, expert_ids = jax.jit(route, static_argnums=1)(logits, routing, bias)
    order = np.argsort(expert_ids, axis=1)
    return tuple(np.take_along_axis(np.asarray(x), order, 1) for x in (expert_ids, weights))


@pytest.mark.parametrize("case", ROUTER_CASES, ids=lambda case: case.name)
def test_choices_and_weights_are_those_of_transformers(case):
    golden, routing = np.load(case.path), routing_of(case)
    bias = case.correction_bias() if case.model == "deepseek_v3" else None
    expert_ids, weights = choose(case, routing, bias)
    np.testing.assert_array_equal(expert_ids, golden["expert_ids"])
    np.testing.assert_allclose(weights, golden["weights"], rtol=2e-6)


@pytest.mark.parametrize(
    "name,changes",
    [
        ("v2_groups", {"num_groups": 1}),
        ("v2_groups", {"top_groups": 4}),
        ("v3", {"group_top": 1}),
        ("v3", {"scoring": "softmax"}),
    ],
    ids=str,
)
def test_every_option_counts(name, changes):
    """Or the goldens would compare nothing."""
    case = next(case for case in ROUTER_CASES if case.name == name)
    bias = case.correction_bias() if case.model == "deepseek_v3" else None
    routing = dataclasses.replace(routing_of(case), **changes)
    assert (choose(case, routing, bias)[0] != np.load(case.path)["expert_ids"]).any()


def test_correction_bias_changes_choices():
    case = next(case for case in ROUTER_CASES if case.name == "v3")
    assert (choose(case, routing_of(case))[0] != np.load(case.path)["expert_ids"]).any()


def test_of_equals_the_lower_is_chosen():
    weights, expert_ids = route(jnp.zeros((3, NUM_EXPERTS)), Routing(top_k=4, norm_topk_prob=True))
    assert expert_ids.tolist() == [[0, 1, 2, 3]] * 3
    np.testing.assert_allclose(weights, 0.25)


def test_weights_are_float32_whatever_the_scores_are():
    logits = jax.random.normal(jax.random.key(0), (5, 8), jnp.bfloat16)
    weights, _ = route(logits, Routing(top_k=2))
    assert weights.dtype == jnp.float32
    want = np.sort(jax.nn.softmax(logits.astype(jnp.float32)), axis=1)[:, :-3:-1]
    np.testing.assert_allclose(weights, want, rtol=1e-6)

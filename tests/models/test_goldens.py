"""Every architecture and variant against Hugging Face transformers, at the level of the model.

One forward of a prompt and the greedy tokens that transformers gave for it answers everything: a
position's logits depend on what precedes it only.
"""

import dataclasses
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Int32

from jaxserve.models.config import ModelConfig
from jaxserve.models.interface import CausalAttention
from jaxserve.models.registry import ARCHITECTURES, create_model
from jaxserve.models.weights import Checkpoint, load_params
from tests.golden.cases import CASES, Case
from tests.golden.golden import CLOSE, FOLDER, Prompt, read_golden
from tests.golden.random_checkpoint import write_checkpoint

PADDED_LENGTH = 256  # of every prompt and its greedy tokens: few shapes, so little to compile
TOLERANCE = 1e-4  # of the largest logit, in float32; measured on a CPU: at most 2.5e-6


@dataclasses.dataclass(frozen=True)
class Answer:
    """What transformers said about a prompt, and what jaxserve computes for it."""

    prompt: Prompt
    logits: np.ndarray  # f32[T, V], at every position of the prompt and its greedy tokens
    expert_ids: np.ndarray | None  # i32[S, T, k], in layers that have experts


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NotingAttention(CausalAttention):
    """Keeps what every layer's router has chosen."""

    expert_ids: Int32[Array, "S T k"] | None = None

    def note_experts(self, expert_ids):
        return dataclasses.replace(self, expert_ids=jnp.stack(expert_ids) if expert_ids else None)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def answers(request, tmp_path_factory) -> list[Answer]:
    case = request.param
    golden = read_golden(case.name)
    folder = tmp_path_factory.mktemp(case.name)
    digest = write_checkpoint(case.config, folder, case.seed, **case.checkpoint_options())
    assert digest == golden.checkpoint, "made from another checkpoint: see tests/golden/README.md"
    model = load(case, folder)
    return [answer(model, prompt) for prompt in golden.prompts]


def load(case: Case, folder: pathlib.Path) -> nnx.Module:
    config = ModelConfig.from_pretrained(folder, case.context_length)
    graphdef, abstract = create_model(config, dtype=jnp.float32)
    checkpoint = Checkpoint(folder)
    model = nnx.merge(graphdef, load_params(checkpoint, abstract))
    checkpoint.close()
    return model


def answer(model: nnx.Module, prompt: Prompt) -> Answer:
    tokens = np.concatenate([prompt.tokens, prompt.greedy_tokens])
    padded = jnp.asarray(np.pad(tokens, (0, PADDED_LENGTH - len(tokens))))
    positions = jnp.arange(PADDED_LENGTH)
    attend = NotingAttention(is_live=positions < len(tokens))
    with jax.default_matmul_precision("highest"):
        hidden, attend = model(padded, positions, attend)
        logits = np.asarray(model.logits(hidden))
    chosen = attend.expert_ids
    return Answer(prompt, logits[: len(tokens)], None if chosen is None else np.asarray(chosen))


def test_logits_are_those_of_transformers(answers):
    for answer in answers:
        expected = answer.prompt.logits
        error = abs(answer.logits[answer.prompt.positions] - expected).max() / abs(expected).max()
        print(f"{len(answer.prompt.tokens)} tokens: relative error {error:.1e}")
        assert error < TOLERANCE


def test_greedy_tokens_are_those_of_transformers(answers):
    for answer in answers:
        prompt = answer.prompt
        before = np.arange(len(prompt.greedy_tokens)) + len(prompt.tokens) - 1
        is_clear = prompt.gaps > CLOSE
        predicted = answer.logits[before].argmax(axis=-1)
        print(f"{len(prompt.tokens)} tokens: {is_clear.sum()} greedy tokens compared")
        np.testing.assert_array_equal(predicted[is_clear], prompt.greedy_tokens[is_clear])
        assert is_clear.sum() >= len(is_clear) // 2


def test_experts_are_those_that_transformers_chooses(answers, request):
    case = request.node.callspec.params["answers"]
    if not case.has_experts:
        assert all(answer.expert_ids is None for answer in answers)
        return
    moe = ModelConfig.from_dict(case.config).moe
    for answer in answers:
        expected = answer.prompt.expert_ids
        chosen = answer.expert_ids[:, : len(answer.prompt.tokens)]
        counts = np.bincount(chosen.reshape(-1), minlength=moe.num_experts)
        print(f"{expected.shape} choices equal; of each expert {counts}")
        np.testing.assert_array_equal(np.sort(chosen, axis=-1), expected)
        assert (counts > 0).sum() > moe.routing.top_k


def test_every_architecture_has_cases():
    assert {case.config["architectures"][0] for case in CASES} == set(ARCHITECTURES)


def test_every_case_has_a_golden_and_every_golden_a_case():
    assert sorted(case.name for case in CASES) == sorted(path.stem for path in FOLDER.glob("*.npz"))

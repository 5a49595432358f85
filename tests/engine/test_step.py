"""The step as a function of one's own: the demo model's answers, in every place it may stand."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxserve
from jaxserve import SamplingBatch, make_step
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.forward import token_logprobs
from jaxserve.models.fuse import unfuse
from jaxserve.models.weights import load_params
from jaxserve.step import NONE_DRAWN
from jaxserve.tokenizer import Tokenizer

FOLDER = pathlib.Path(jaxserve.__file__).with_name("demo_model")
QUESTIONS = {
    "What is the capital of France?": " The capital of France is Paris.",
    "What is the capital of Peru?": " The capital of Peru is Lima.",
}
ROWS, STOPS, NUM_STEPS = len(QUESTIONS), (0, 2), 12


@pytest.fixture(scope="module")
def step():
    config = ModelConfig.from_pretrained(str(FOLDER), None, {})
    return make_step(config, max_rows=ROWS, max_len=48, max_tokens=24, page_size=4, dtype="float32")


@pytest.fixture(scope="module")
def params(step):
    return load_params(Checkpoint(FOLDER), step.abstract_params)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(FOLDER)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.encode(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def jitted(step):
    """Extend and decode, each compiled once for the module; the state is donated."""
    return (
        jax.jit(step.__call__, donate_argnums=1),
        jax.jit(step.decode, static_argnums=2, donate_argnums=1),
    )


def packed(step, rows: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    tokens = [token for row in rows for token in row]
    tokens += [0] * (step.shape.max_tokens - len(tokens))
    return jnp.array(tokens, jnp.int32), jnp.array([len(row) for row in rows], jnp.int32)


def answers(tokenizer, drawn: np.ndarray) -> list[str]:
    """`drawn` is [K, B]."""
    return [tokenizer.decode([t for t in row if t != NONE_DRAWN]) for row in drawn.T.tolist()]


def run(step, jitted, params, prompts, num_steps: int = NUM_STEPS, **sampling):
    """Tokens and logprobs, [1 + K, B]."""
    extend, decode = jitted
    batch = SamplingBatch.of(ROWS, **({"temperature": 0.0} | sampling))
    state = step.init_state(batch, STOPS)
    state, first = extend(params, state, *packed(step, prompts))
    state, rest = decode(params, state, num_steps)
    return tuple(
        np.concatenate([np.asarray(getattr(first, name))[None], np.asarray(getattr(rest, name))])
        for name in ("tokens", "logprobs", "is_finished")
    )


def test_questions_are_answered(step, jitted, params, prompts, tokenizer):
    tokens, _, is_finished = run(step, jitted, params, prompts)
    assert answers(tokenizer, tokens) == list(QUESTIONS.values())
    assert is_finished[-1].all() and (tokens[-1] == NONE_DRAWN).all(), "and then nothing more"


def test_prompts_may_come_in_chunks_beside_rows_that_decode(
    step, jitted, params, prompts, tokenizer
):
    """The second row begins while the first has half of its answer."""
    extend, decode = jitted
    state = step.init_state(stop_ids=STOPS)
    first, second = prompts
    drawn = []
    for rows in ([first[:3], []], [first[3:], []], [[-1], second[:2]], [[-1], second[2:]]):
        state, out = extend(params, state, *packed(step, rows))
        drawn.append(np.asarray(out.tokens))
    state, rest = decode(params, state, NUM_STEPS)
    drawn = np.concatenate([np.stack(drawn), np.asarray(rest.tokens)])
    assert drawn[0, 1] == drawn[1, 1] == NONE_DRAWN, "a row without tokens draws none"
    drawn[0, 0] = drawn[2, 1] = NONE_DRAWN  # drawn within the prompts
    assert answers(tokenizer, drawn) == list(QUESTIONS.values())


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_the_training_forward(step, jitted, params, prompts, temperature):
    tokens, logprobs, _ = run(step, jitted, params, prompts, temperature=temperature)
    model, worst = nnx.merge(step.graphdef, params), 0.0
    for row, prompt in enumerate(prompts):
        answer = [token for token in tokens[:, row].tolist() if token != NONE_DRAWN]
        text = jnp.array([prompt + answer], jnp.int32)
        expected = np.asarray(token_logprobs(model, text, temperature))[0, -len(answer) :]
        worst = np.maximum(
            worst, np.abs(expected - logprobs[: len(answer), row]).max()
        )  # NaN stays
    print(f"largest difference of a logprob: {worst:.1e}")
    assert worst < 1e-4


def test_seeds_alone_decide_what_is_drawn(step, jitted, params, prompts):
    draw = functools.partial(run, step, jitted, params, prompts, temperature=3.0)
    first, again, other = (draw(seeds=seeds)[0] for seeds in ([1, 2], [1, 2], [3, 2]))
    np.testing.assert_array_equal(first, again)
    assert (first[:, 0] != other[:, 0]).any()
    np.testing.assert_array_equal(first[:, 1], other[:, 1])


def test_engine_draws_the_same(step, jitted, params, prompts, pytestconfig):
    """A step of one's own and the server: the same tokens from the same seeds."""
    from tests.server.serving import programs_folder

    tokens, logprobs, _ = run(step, jitted, params, prompts, temperature=1.3, seeds=[7, 8])
    with jaxserve.Engine(
        model_path=str(FOLDER),
        dtype="float32",
        max_running_requests=2,
        chunked_prefill_size=16,
        page_size=4,
        compilation_cache_dir=programs_folder(pytestconfig),
    ) as engine:
        served = engine.generate(
            input_ids=prompts,
            sampling_params=[
                {"temperature": 1.3, "sampling_seed": seed, "max_new_tokens": 13} for seed in (7, 8)
            ],
            return_logprob=True,
        )
    for row, answer in enumerate(served):
        count = len(answer["output_ids"])
        assert answer["output_ids"] == tokens[:count, row].tolist() and count > 3
        told = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
        np.testing.assert_allclose(told, logprobs[:count, row], atol=1e-4)


def test_rows_are_used_again(step, jitted, params, prompts, tokenizer):
    extend, decode = jitted
    state = step.init_state(stop_ids=STOPS)
    state, _ = extend(params, state, *packed(step, prompts))
    state, _ = decode(params, state, NUM_STEPS)
    state = step.restart(state, jnp.array([True, False]))
    state, first = extend(params, state, *packed(step, [prompts[1], []]))
    _, rest = decode(params, state, NUM_STEPS)
    drawn = np.concatenate([np.asarray(first.tokens)[None], np.asarray(rest.tokens)])
    assert answers(tokenizer, drawn) == [list(QUESTIONS.values())[1], ""]


def test_tensors_of_a_trainer_are_prepared_once(step, params):
    prepared = step.prepare(unfuse(params))
    assert jax.tree.structure(prepared) == jax.tree.structure(params)
    assert step.prepare(prepared) is prepared


def test_inside_jit_and_scan(step, params, prompts, tokenizer):
    """A whole rollout is one program, made from the trainer's tensors."""

    @jax.jit
    def rollout(tensors, tokens, lengths):
        params = step.prepare(tensors)
        state, first = step(params, step.init_state(stop_ids=STOPS), tokens, lengths)

        def body(state, _):
            state, out = step.decode(params, state)
            return state, out.tokens[0]

        _, rest = jax.lax.scan(body, state, length=NUM_STEPS)
        return jnp.concatenate([first.tokens[None], rest])

    drawn = rollout(unfuse(params), *packed(step, prompts))
    assert answers(tokenizer, np.asarray(drawn)) == list(QUESTIONS.values())


def test_step_that_stops_at_the_longest_length(step, jitted, params, prompts):
    extend, decode = jitted
    state = step.init_state()
    state, _ = extend(params, state, *packed(step, prompts))
    _, out = decode(params, state, 60)
    drawn = (np.asarray(out.tokens) != NONE_DRAWN).sum(axis=0)
    assert drawn.tolist() == [48 - 1 - len(prompt) for prompt in prompts]
    assert np.asarray(out.is_finished)[-1].all()


def test_more_tokens_than_there_is_room_for_are_refused(step, params):
    with pytest.raises(ValueError, match="25 tokens: max_tokens is 24"):
        step(params, step.init_state(), jnp.zeros(25, jnp.int32), jnp.zeros(ROWS, jnp.int32))
    with pytest.raises(ValueError, match="at most 8"):
        step.init_state(stop_ids=range(9))
    with pytest.raises(ValueError, match="no mesh"):
        _ = step.param_shardings


def mesh(name: str):
    """Of as many CPU devices as tests/conftest.py makes."""
    return jax.make_mesh((2,), (name,), axis_types=(AxisType.Auto,))


def test_in_shard_map_over_another_axis(step, params, prompts, tokenizer):
    """Each device has rows, cache and seeds of its own."""
    mesh_of_data = mesh("data")
    params = jax.device_put(params, jax.NamedSharding(mesh_of_data, P()))

    def shard(params, tokens, lengths):
        state = step.init_state(stop_ids=STOPS)
        state, first = step(params, state, tokens[0], lengths[0])
        _, rest = step.decode(params, state, NUM_STEPS)
        return jnp.concatenate([first.tokens[None], rest.tokens])[None]

    rollout = jax.jit(
        jax.shard_map(
            shard, mesh=mesh_of_data, in_specs=(P(), P("data"), P("data")), out_specs=P("data")
        )
    )
    batches = [packed(step, rows) for rows in (prompts, prompts[::-1])]
    drawn = np.asarray(rollout(params, *map(jnp.stack, zip(*batches, strict=True))))
    assert answers(tokenizer, drawn[0]) == list(QUESTIONS.values())
    assert answers(tokenizer, drawn[1]) == list(QUESTIONS.values())[::-1]


def test_parameters_sharded_over_a_mesh(step, params, prompts, tokenizer, jitted):
    sharded_step = dataclasses.replace(step, mesh=mesh("tensor"))
    sharded = jax.device_put(params, sharded_step.param_shardings)
    specs = {tuple(leaf.sharding.spec) for leaf in jax.tree.leaves(sharded)}
    print(f"shardings: {specs}")
    assert ("tensor", None, None, None) in specs and (None, "tensor") in specs
    tokens, *_ = run(sharded_step, jitted, sharded, prompts)
    assert answers(tokenizer, tokens) == list(QUESTIONS.values())

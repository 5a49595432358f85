"""An engine that answers with vectors, beyond its steps: failures, replays, new weights, loops."""

import asyncio
import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jaxserve import Engine
from jaxserve.config import EngineConfig
from jaxserve.errors import RequestError
from jaxserve.plan_log import PlanLog
from jaxserve.replay import compare, load_runner
from tests.golden.pooled.cases import CASES
from tests.golden.pooled.golden import read_golden
from tests.server.serving import programs_folder

CASE = next(case for case in CASES if case.name == "llama_classification")
PROMPTS = [prompt.tolist() for prompt in read_golden(CASE.name).prompts]


@pytest.fixture(scope="module")
def config(tmp_path_factory, pytestconfig) -> EngineConfig:
    folder = tmp_path_factory.mktemp("reward")
    CASE.write(folder / "model")
    return EngineConfig(
        model_path=str(folder / "model"),
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        chunked_prefill_size=12,
        max_running_requests=4,
        record_plans=str(folder / "run.plans"),
        compilation_cache_dir=programs_folder(pytestconfig),
    )


@pytest.fixture(scope="module")
def engine(config) -> Iterator[Engine]:
    with Engine(config) as engine:
        yield engine
    jax.clear_caches()


@pytest.fixture(scope="module")
def expected(engine) -> np.ndarray:
    return encode(engine)


def encode(engine: Engine) -> np.ndarray:
    return np.array([one["embedding"] for one in engine.encode(input_ids=PROMPTS)], np.float32)


def fail_once(engine: Engine, num_reads: int) -> None:
    """After so many steps one fails, and takes the state with it."""
    runner, read, left = engine._core._runner, engine._core._runner.read, [num_reads]

    def failing(fresh):
        left[0] -= 1
        if left[0] >= 0:
            return read(fresh)
        del runner.read
        for leaf in jax.tree.leaves(runner._state):
            leaf.delete()
        raise RuntimeError("injected")

    runner.read = failing


@pytest.mark.parametrize("num_reads", [0, 3, 11])
def test_failed_step_changes_no_vector(engine, expected, num_reads):
    fail_once(engine, num_reads)
    engine.flush_cache()
    vectors = encode(engine)
    assert "read" not in vars(engine._core._runner), "the failure has happened"
    np.testing.assert_allclose(vectors, expected, rtol=1e-5)
    retractions = engine._frontend.call("internal_state").result()["num_retractions"]
    print(f"{retractions} retractions until now")
    assert retractions > 0 and engine.flush_cache()


def test_many_in_an_asyncio_loop(engine, expected):
    async def run() -> list[dict]:
        calls = (engine.async_encode(input_ids=PROMPTS[i % 3]) for i in range(12))
        return await asyncio.gather(*calls)

    for i, answer in enumerate(asyncio.run(run())):
        np.testing.assert_allclose(answer["embedding"], expected[i % 3], rtol=1e-5)


def test_weights_of_this_process(engine, expected):
    """Vectors of the same prompts, whose prefix is cached of other weights."""
    weights = engine.weights()
    engine.update_weights(weights | {"score.weight": 2 * weights["score.weight"]})
    np.testing.assert_allclose(encode(engine), 2 * expected, rtol=1e-5)
    engine.update_weights(weights)
    np.testing.assert_allclose(encode(engine), expected, rtol=1e-5)


def test_vector_that_is_not_finite_is_an_error(engine, expected):
    weights = engine.weights()
    engine.update_weights(weights | {"score.weight": np.nan * weights["score.weight"]})
    answer = engine.encode(input_ids=PROMPTS[0])
    print(answer)
    reason = answer["meta_info"]["finish_reason"]
    assert (reason["type"], reason["status_code"], answer["embedding"]) == ("abort", 500, [])
    engine.update_weights(weights)
    np.testing.assert_allclose(encode(engine), expected, rtol=1e-5)


def test_it_generates_nothing_and_compiles_little(engine, expected):
    with pytest.raises(RequestError, match="answers with embeddings"):
        engine.generate(input_ids=[1, 2])
    names = {key[0] for key in engine._core._runner._programs}
    print(sorted(names))
    assert names == {"extend", "pool", "patch", "copy_pages", "peek"}


def test_replay_has_the_same_vectors_and_notices_others(config, tmp_path):
    """A run of its own: weights that were sent cannot be replayed."""
    config = dataclasses.replace(config, record_plans=str(tmp_path / "run.plans"))
    with Engine(config) as engine:
        encode(engine)
        engine.flush_cache()
        fail_once(engine, 2)
        encode(engine)
    with pathlib.Path(config.record_plans).open("rb") as file:
        log = PlanLog(file)
        runner = load_runner(log, config)
        same = compare(runner, records := list(log))
    print(same)
    assert same.is_equal and same.tokens >= 2 * len(PROMPTS) - 1 and same.resets == 1
    first = next(i for i, leaf in enumerate(runner.weights) if leaf.ndim == 2)
    runner.reset()
    runner.swap({first: runner.weights[first] * 1.01})
    other = compare(runner, records)
    print(other)
    assert not other.is_equal


@pytest.mark.matrix
def test_deterministic_vectors_are_equal_to_the_bit(config):
    config = dataclasses.replace(config, record_plans=None, deterministic=True)
    with Engine(config) as engine:
        together = engine.encode(input_ids=PROMPTS)
        engine.flush_cache()
        for prompt, answer in zip(PROMPTS, together, strict=True):
            assert engine.encode(input_ids=prompt)["embedding"] == answer["embedding"]

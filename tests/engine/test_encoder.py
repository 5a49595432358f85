"""An encoder beyond its vectors: failures, a replay, new weights, released memory."""

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
from tests.engine.test_encode import fail_once
from tests.golden.pooled.encoders import ENCODER_CASES, PAIRS
from tests.golden.pooled.golden import read_golden
from tests.server.serving import programs_folder

CASE = next(case for case in ENCODER_CASES if case.name == "bert_pairs")
TEXTS = [list(pair) for pair in PAIRS]
EXPECTED = read_golden(CASE.name).vectors


@pytest.fixture(scope="module")
def config(tmp_path_factory, pytestconfig) -> EngineConfig:
    folder = tmp_path_factory.mktemp("encoder")
    CASE.write(folder / "model")
    return EngineConfig(
        model_path=str(folder / "model"),
        device="cpu",
        max_running_requests=4,
        chunked_prefill_size=16,
        record_plans=str(folder / "run.plans"),
        compilation_cache_dir=programs_folder(pytestconfig),
    )


@pytest.fixture(scope="module")
def engine(config) -> Iterator[Engine]:
    with Engine(config) as engine:
        yield engine
    jax.clear_caches()


def encode(engine: Engine) -> np.ndarray:
    return np.array([one["embedding"] for one in engine.encode(TEXTS)], np.float32)


def test_failed_step_changes_no_score_and_a_replay_has_the_same(engine, config):
    np.testing.assert_allclose(encode(engine), EXPECTED, rtol=1e-4)
    fail_once(engine, 1)
    np.testing.assert_allclose(encode(engine), EXPECTED, rtol=1e-4)
    assert "read" not in vars(engine._core._runner), "the failure has happened"
    engine._core._recorder.close()
    with pathlib.Path(config.record_plans).open("rb") as file:
        log = PlanLog(file)
        same = compare(load_runner(log, config), list(log))
    print(same)
    assert same.is_equal and same.tokens >= 2 * len(TEXTS) - 1 and same.resets == 1


def test_new_weights(engine, config):
    weights = engine.weights()
    doubled = {key: 2 * weights[key] for key in ("classifier.weight", "classifier.bias")}
    engine.update_weights(weights | doubled)
    np.testing.assert_allclose(encode(engine), 2 * EXPECTED, rtol=1e-4)
    answer = engine.update_weights_from_disk(config.model_path)
    print(answer)
    np.testing.assert_allclose(encode(engine), EXPECTED, rtol=1e-4)


def test_released_memory_comes_back(engine):
    engine._frontend.call("release_memory", tags=["kv_cache"]).result()
    with pytest.raises(RequestError, match="released"):
        encode(engine)
    engine._frontend.call("resume_memory", tags=["kv_cache"]).result()
    np.testing.assert_allclose(encode(engine), EXPECTED, rtol=1e-4)

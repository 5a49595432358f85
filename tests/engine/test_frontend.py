"""The caller's side of the engine, without an engine."""

from jaxserve.config import EngineConfig
from jaxserve.frontend import Frontend
from jaxserve.messages import StepNews
from jaxserve.request import FinishReason, RequestUpdate
from tests.engine.test_generate_request import info


def end(frontend: Frontend, generation, *, kind: str = "length", seconds: float) -> None:
    """The engine's news that a request has ended, so long after it was made."""
    generation.created -= seconds
    update = RequestUpdate(generation.request.rid, [1], FinishReason(kind))
    frontend.deliver(StepNews([update]))


def test_retry_after_is_the_time_in_which_one_request_ends():
    frontend = Frontend(EngineConfig(model_path="x", skip_tokenizer_init=True), lambda _: None)
    frontend.set_ready(info())
    generations = frontend.submit(*frontend.prepare({"input_ids": [[1]] * 10})).generations
    assert frontend.retry_after == 1, "nothing has ended yet"
    end(frontend, generations.pop(), kind="abort", seconds=1000)
    assert frontend.retry_after == 1, "it did not have what it asked for"
    end(frontend, generations.pop(), seconds=20)
    assert frontend.retry_after == 3, "of eight that take 20 seconds each, two end in every five"
    for _ in range(7):
        end(frontend, generations.pop(), seconds=20)
    assert frontend.retry_after in (20, 21), "the last one takes its 20 seconds"
    end(frontend, generations.pop(), seconds=0.1)
    assert 1 <= frontend.retry_after < 20, "the newest counts more"

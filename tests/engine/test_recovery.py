"""A device that fails, and a tokenizer that does: no other answer changes."""

import threading
from collections.abc import Callable, Iterator

import jax
import pytest

from jaxserve import Engine
from jaxserve.engine_core import MOST_FAILURES
from jaxserve.errors import EngineDied
from jaxserve.messages import AbortRequest, AddRequest
from jaxserve.request import Request
from jaxserve.runner import Runner
from jaxserve.step_plan import LAST_TOKEN, StepPlan, ints
from tests.server.serving import DEMO_MODEL, GREEDY, SMALL, programs_folder

QUESTION = "What is the capital of France?"
LONG = "Count from three to nine, then name the capital of Peru. " * 5  # two chunks and more
MORE = {"ignore_eos": True, "max_new_tokens": 24}
SEEDED = MORE | {"temperature": 1.0, "sampling_seed": 7}
# Six requests for four rows. What `WARM` leaves in the cache ends within a page of the first ones.
WARM = LONG[:150] + "something else"
REQUESTS = [
    (LONG, GREEDY | MORE),
    (LONG[:180], SEEDED),
    (QUESTION, GREEDY | MORE | {"max_new_tokens": 60}),
    (QUESTION, SEEDED | {"sampling_seed": 8, "frequency_penalty": 0.5, "min_p": 0.01}),
    ("Once upon a time", SEEDED | {"top_k": 20, "logit_bias": {"100": 2.0}}),
    (QUESTION, GREEDY | {"stop": "Paris"}),
]
LOGPROBS = {
    "return_logprob": [True, True, False, True, False, False],
    "logprob_start_len": [0, 40, -1, -1, -1, -1],
    "top_logprobs_num": [2, 0, 0, 0, 0, 0],
}
PLACES = ["before dispatch", "after dispatch", "read"]


def kinds_of(plan: StepPlan) -> set[str]:
    """What a step does."""
    kinds = {"copy"} if plan.copies else set()
    if plan.kind == "decode":
        return kinds | {"decode" if plan.num_steps == 1 else "several steps"}
    forward, count = ints(plan.forward), plan.num_rows
    lengths, samples = forward[count : 2 * count], forward[2 * count : 3 * count]
    has_decode = (forward[3 * count :] == LAST_TOKEN).any()
    kinds.add("mixed" if has_decode else "prefill")
    if ((lengths > 0) & (samples == 0)).any():
        kinds.add("chunk")
    return kinds


class FailingRunner:
    """In a runner's place: fails where it is told to."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.quiet()

    def quiet(self) -> None:
        self.failures: list[StepPlan] = []
        self.num_steps = self.num_resets = 0
        self._should_fail: Callable[[str, StepPlan], bool] = lambda place, plan: False

    def fail_when(self, should_fail: Callable[[str, StepPlan], bool]) -> None:
        self.quiet()
        self._should_fail = should_fail

    def fail_once(self, place: str, kind: str, skipped: int = 0) -> None:
        """At one step of a kind, the first one but for those `skipped`."""
        left = [skipped]

        def should_fail(at: str, plan: StepPlan) -> bool:
            if at != place or kind not in kinds_of(plan) or self.failures:
                return False
            left[0] -= 1
            return left[0] < 0

        self.fail_when(should_fail)

    def dispatch(self, plan: StepPlan):
        self.num_steps += 1
        self._maybe_fail("before dispatch", plan)
        fresh = self._runner.dispatch(plan)
        self._maybe_fail("after dispatch", plan)
        return plan, fresh, self.num_resets

    def read(self, fresh):
        plan, arrays, num_resets = fresh
        self._maybe_fail("read", plan)
        assert num_resets == self.num_resets, "what followed a step that failed has failed too"
        return self._runner.read(arrays)

    def reset(self) -> None:
        self.num_resets += 1
        self._runner.reset()

    def release(self) -> None:
        self._runner.release()

    def _maybe_fail(self, place: str, plan: StepPlan) -> None:
        if self._should_fail(place, plan):
            self.failures.append(plan)
            if place != "before dispatch":
                for leaf in jax.tree.leaves(self._runner._state):
                    leaf.delete()  # as programs that fail do with what was donated to them
            raise RuntimeError("injected")


@pytest.fixture(scope="module")
def make_engine(pytestconfig):
    folder = programs_folder(pytestconfig)

    def make(**options) -> Engine:
        engine = Engine(
            **{"model_path": DEMO_MODEL, "compilation_cache_dir": folder} | SMALL | options
        )
        engine._core._runner = FailingRunner(engine._core._runner)
        return engine

    yield make
    jax.clear_caches()


@pytest.fixture(scope="module", params=[1, 4], ids=["K=1", "K=4"])
def engine(make_engine, request) -> Iterator[Engine]:
    with make_engine(num_continuous_decode_steps=request.param) as engine:
        engine.num_steps = request.param
        yield engine


@pytest.fixture(scope="module")
def expected(engine) -> list[dict]:
    """What nothing has disturbed."""
    return run(engine)


@pytest.fixture
def runner(engine) -> Iterator[FailingRunner]:
    runner = engine._core._runner
    runner.quiet()
    before = num_compiled(engine)
    yield runner
    assert num_compiled(engine) == before, "a new state needs no program that is not there"
    runner.quiet()
    assert engine.flush_cache(), "nobody is left"
    scheduler = engine._core.scheduler
    scheduler.check_integrity()
    assert scheduler.allocator.num_used == 0


def num_compiled(engine: Engine) -> int:
    return engine._frontend.call("internal_state").result()["compiled_after_ready"]


def run(engine: Engine) -> list[dict]:
    """The last answers of streams that only ever grow, with a prefix in the cache."""
    engine.flush_cache()
    failing, engine._core._runner = engine._core._runner, engine._core._runner._runner
    engine.generate(WARM, GREEDY)
    engine._core._runner = failing
    texts, params = map(list, zip(*REQUESTS, strict=True))
    last: dict[int, dict] = {}
    for answer in engine.generate(texts, params, stream=True, **LOGPROBS):
        before = last.get(answer["index"], {"output_ids": [], "text": ""})
        assert answer["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert answer["text"].startswith(before["text"])
        last[answer["index"]] = answer
    return [last[index] for index in range(len(REQUESTS))]


def essence(answers: list[dict]) -> list[tuple]:
    return [
        (
            answer["output_ids"],
            answer["text"],
            answer["meta_info"]["finish_reason"],
            *logprobs_of(answer["meta_info"]),
        )
        for answer in answers
    ]


def logprobs_of(meta: dict) -> list:
    """To three digits: computed in other steps, the last ones may differ."""
    triples = meta.get("input_token_logprobs", []) + meta.get("output_token_logprobs", [])
    for line in meta.get("input_top_logprobs", []) + meta.get("output_top_logprobs", []):
        triples += line or []
    return [(value and round(value, 3), token) for value, token, _ in triples]


@pytest.mark.parametrize("place", PLACES)
def test_step_that_fails_changes_no_answer(engine, expected, runner, place):
    """Of every kind that the run has, and late ones as well as the first."""
    decode = "decode" if engine.num_steps == 1 else "several steps"
    for kind in ("prefill", "chunk", "copy", "mixed", decode):
        for skipped in (0, 1, 7) if kind == decode else (0,):
            runner.fail_once(place, kind, skipped)
            got = run(engine)
            (failed,) = runner.failures
            retractions = [answer["meta_info"]["num_retractions"] for answer in got]
            print(f"{kind}: step {failed.step}, {kinds_of(failed)}, computed again: {retractions}")
            assert essence(got) == essence(expected)
            assert runner.num_resets == 1 and max(retractions) == 1
    print(f"{len(essence(got)[0]) - 3} logprobs of the first answer are the same")


@pytest.mark.parametrize("place", PLACES)
def test_device_that_fails_now_and_then_changes_no_answer(engine, expected, runner, place):
    """Also twice in a row: a step, then the one that should mend it."""
    runner.fail_when(lambda at, plan: at == place and runner.num_steps % 9 in (7, 8))
    got = run(engine)
    print(f"{len(runner.failures)} of {runner.num_steps} steps failed at {place}")
    assert len(runner.failures) >= 3
    assert essence(got) == essence(expected)


def test_new_state_that_cannot_be_had_at_once(engine, expected, runner):
    """The failed step may have left too little room: it is tried again."""
    runner.fail_once("read", "mixed")
    failing = [True, False]
    reset = runner._runner.reset

    def reset_the_second_time():
        if failing.pop(0):
            raise MemoryError("injected")
        reset()

    runner._runner.reset = reset_the_second_time
    try:
        assert essence(run(engine)) == essence(expected)
    finally:
        del runner._runner.reset
    assert runner.num_resets == 2 and not failing


def requests_of(engine: Engine) -> list[Request]:
    texts, params = map(list, zip(*REQUESTS, strict=True))
    return engine._frontend.prepare({"text": texts, "sampling_params": params})[1]


def step_until_it_gives_up(engine: Engine, requests: list[Request]) -> EngineDied:
    """Runs the core of an idle engine here; nobody is left in it afterwards."""
    core = engine._core
    for request in requests:
        assert core.handle(AddRequest(request)) == []
    with pytest.raises(EngineDied) as died:
        for _ in range(100):
            core.step()
    for request in requests:
        core.handle(AbortRequest(request.rid))
    core._inflight.clear()
    core._is_state_lost = True
    return died.value


@pytest.mark.parametrize("place", PLACES)
def test_device_that_is_gone_ends_the_engine(engine, runner, place):
    runner.fail_when(lambda at, plan: at == place)
    died = step_until_it_gives_up(engine, requests_of(engine))
    print(died)
    assert str(died) == (
        "the engine failed: 3 steps in a row did, the last one with RuntimeError: injected"
    )
    assert len(runner.failures) == MOST_FAILURES


def test_chunks_that_succeed_are_no_progress(engine, runner):
    """A prompt whose last chunk always fails would be computed for ever."""
    runner.fail_when(
        lambda at, plan: at == "read" and plan.kind == "extend" and "chunk" not in kinds_of(plan)
    )
    step_until_it_gives_up(engine, requests_of(engine)[:1])
    print(f"{runner.num_steps} steps, {len(runner.failures)} failed")
    assert len(runner.failures) == MOST_FAILURES < runner.num_steps


def test_failures_with_progress_between_them_never_add_up(engine, expected, runner):
    """Every decode step fails: each request gets its tokens one by one, from prompts."""
    runner.fail_when(lambda at, plan: at == "read" and plan.kind == "decode")
    assert essence(run(engine)) == essence(expected)
    print(f"{len(runner.failures)} of {runner.num_steps} steps failed")
    assert len(runner.failures) > 10 * MOST_FAILURES


class FailingTokenizer:
    """In a tokenizer's place: fails at ids that hold a certain one."""

    def __init__(self, tokenizer, poison: int, error: Exception):
        self._tokenizer, self._poison, self._error = tokenizer, poison, error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids, **options) -> str:
        if self._poison in ids:
            raise self._error
        return self._tokenizer.decode(ids, **options)


@pytest.fixture
def poisoned(engine, expected) -> Iterator[None]:
    """A tokenizer that fails in the engine at the last request's fifth token."""
    core, tokenizer = engine._core, engine._core.tokenizer
    poison = expected[-1]["output_ids"][4]
    core.tokenizer = FailingTokenizer(tokenizer, poison, OverflowError("injected"))
    yield
    core.tokenizer = tokenizer


def test_tokenizer_that_fails_at_a_stop_string_ends_that_request_alone(
    engine, expected, runner, poisoned
):
    got = run(engine)
    print(got[-1])
    assert essence(got[:-1]) == essence(expected[:-1])
    ids = got[-1]["output_ids"]
    assert len(ids) < 5 and ids == expected[-1]["output_ids"][: len(ids)]
    assert got[-1]["meta_info"]["finish_reason"] == {
        "type": "abort",
        "message": "OverflowError: injected",
        "status_code": 500,
        "err_type": "InternalServerError",
    }
    assert runner.num_resets == 0, "no step has failed"


def test_tokenizer_that_fails_at_a_prompt_ends_that_request_alone(engine, expected, runner):
    core, tokenizer = engine._core, engine._core.tokenizer
    last = tokenizer.encode(QUESTION)[-1]
    core.tokenizer = FailingTokenizer(tokenizer, last, ValueError("injected"))
    try:
        got = run(engine)
    finally:
        core.tokenizer = tokenizer
    assert essence(got[:-1]) == essence(expected[:-1]), "without a stop string there is no need"
    reason = got[-1]["meta_info"]["finish_reason"]
    assert (reason["status_code"], reason["message"]) == (500, "ValueError: injected")
    assert got[-1]["output_ids"] == []


def test_engine_that_gives_up_ends_everybody(make_engine):
    with make_engine() as engine:
        runner = engine._core._runner
        endless = GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}
        answers = [engine.generate(QUESTION, endless, stream=True) for _ in range(6)]
        for answer in answers[:4]:
            next(answer)  # it runs; the other two wait
        ended = []

        def wait_for_end(answer) -> None:
            with pytest.raises(EngineDied, match="3 steps in a row did.*injected"):
                list(answer)
            ended.append(answer)

        threads = [threading.Thread(target=wait_for_end, args=(answer,)) for answer in answers]
        runner.fail_when(lambda place, plan: place == "read")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(ended) == len(answers)
        with pytest.raises(EngineDied, match="injected"):
            engine.generate(QUESTION)

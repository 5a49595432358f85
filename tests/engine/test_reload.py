"""Other weights while the engine runs: which tokens are whose, and what becomes of requests."""

import concurrent.futures
import gc
import json
import pathlib
import threading
import time

import pytest

from jaxserve import Engine, answer_queue, served_weights
from jaxserve.compile_counter import CompileCounter
from jaxserve.errors import RequestError
from jaxserve.plan_log import Drawn, PlanLog, PlannedStep, WeightsChanged
from tests.engine.reloading import (
    ENDLESS,
    QUESTION,
    TEXTS,
    TOKENS,
    live_bytes,
    output,
    outputs,
    spans,
    write_variant,
)
from tests.server.serving import DEMO_MODEL, SMALL, programs_folder, wait_for

MANY = [f"{text} {i}" for i in range(16) for text in TEXTS[:4]]
EMBEDDING = "model.embed_tokens.weight"
LONGER = TOKENS | {"max_new_tokens": 60}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    return str(write_variant(tmp_path_factory.mktemp("weights") / "other"))


@pytest.fixture(scope="module")
def engine(pytestconfig, tmp_path_factory, other):
    folder = programs_folder(pytestconfig)
    with Engine(
        model_path=DEMO_MODEL,
        compilation_cache_dir=folder,
        weights_root="/",
        record_plans=str(tmp_path_factory.mktemp("plans") / "plans"),
        **SMALL,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine, other) -> dict[str, list[list[int]]]:
    """What each version answers."""
    with_other = (engine.update_weights_from_disk(other), outputs(engine))[1]
    with_demo = (engine.update_weights_from_disk(DEMO_MODEL), outputs(engine))[1]
    print(with_demo, with_other)
    assert all(a != b for a, b in zip(with_demo, with_other, strict=True))
    return {"demo": with_demo, "other": with_other}


@pytest.fixture(autouse=True)
def demo(engine, expected):
    """Every test begins with the demo model's weights, and an idle engine."""
    engine.continue_generation()
    engine.update_weights_from_disk(DEMO_MODEL, weight_version="demo", in_flight="abort")
    wait_for(engine.flush_cache, 5)


def start_many(engine: Engine, params=LONGER) -> list:
    """64 requests in flight, the first of which have some tokens."""
    streams = [engine.generate(text, params, stream=True) for text in MANY]
    for _ in range(3):
        next(streams[0])
    return streams


def last(stream) -> dict:
    return list(stream)[-1]


def test_update_serves_the_other_weights_and_tells_so(engine, expected, other):
    assert outputs(engine) == expected["demo"]
    answer = engine.update_weights_from_disk(other, weight_version="step 7")
    assert answer == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version updated to step 7.",
        "num_paused_requests": 0,
    }
    answer = engine.generate(QUESTION, TOKENS)
    assert answer["meta_info"]["weight_version"] == "step 7"
    assert spans(answer) == [("step 7", 0, 12)]
    assert outputs(engine) == expected["other"]
    state = engine.state
    assert (state.model_path, state.model_name, state.weight_version) == (other, other, "step 7")
    count = state.num_updates
    message = engine.update_weights_from_disk(DEMO_MODEL)["message"]
    assert message == "Succeeded to update model weights."
    assert engine.state.weight_version == "step 7", "a label stays until another is given"
    assert engine.state.num_updates == count + 1


def test_nothing_that_other_weights_computed_is_matched(engine, expected, other):
    output(engine)
    assert engine.generate(QUESTION, TOKENS)["meta_info"]["cached_tokens"] > 0
    for flush in (True, False):
        engine.update_weights_from_disk(other, flush_cache=flush)
        answer = engine.generate(QUESTION, TOKENS)
        assert answer["meta_info"]["cached_tokens"] == 0
        assert answer["output_ids"] == expected["other"][0]


def test_wait_lets_those_in_flight_finish_and_holds_the_later_ones(engine, other):
    alone = {text: output(engine, text) for text in MANY[:4]}
    streams = start_many(engine)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        update = pool.submit(engine.update_weights_from_disk, other, weight_version="other")
        later = []
        while not update.done():
            later.append(engine.generate(QUESTION, TOKENS, stream=True))
            time.sleep(0.02)
        update.result()
    answers = [last(stream) for stream in streams]
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"length"}
    assert all(spans(answer) == [("demo", 0, 60)] for answer in answers)
    for text, answer in zip(MANY[:4], answers, strict=False):
        assert answer["output_ids"][:12] == alone[text]
    by_version = {"demo": [], "other": []}
    for answer in map(last, later):
        ((version, start, end),) = spans(answer)
        assert (start, end) == (0, 12), "none is of both"
        by_version[version].append(answer["output_ids"])
    print({version: len(ids) for version, ids in by_version.items()})
    assert by_version["other"], "some were held"
    for version, ids in by_version.items():
        engine.update_weights_from_disk(other if version == "other" else DEMO_MODEL)
        assert ids == [output(engine)] * len(ids)


def test_abort_ends_those_in_flight_with_what_they_have(engine, expected, other):
    streams = start_many(engine)
    engine.update_weights_from_disk(other, abort_all_requests=True)
    answers = [last(stream) for stream in streams]
    assert len(answers) == 64
    reasons = [answer["meta_info"]["finish_reason"] for answer in answers]
    aborted = [reason["message"] for reason in reasons if reason["type"] == "abort"]
    print({message: aborted.count(message) for message in aborted})
    assert aborted.count("Aborted") >= 3 and aborted.count("Abort in waiting queue") > 0
    partial = answers[0]
    assert 3 <= len(partial["output_ids"]) < 60 and partial["text"]
    assert spans(partial) == [("demo", 0, len(partial["output_ids"]))]
    assert outputs(engine) == expected["other"]


def test_retract_computes_anew_what_was_begun_and_goes_on_with_the_other_weights(
    engine, expected, other
):
    streams = start_many(engine)
    answer = engine.update_weights_from_disk(other, weight_version="other", in_flight="retract")
    assert 1 <= answer["num_paused_requests"] <= SMALL["max_running_requests"]
    answers = [last(stream) for stream in streams]
    mixed = [answer for answer in answers if len(spans(answer)) == 2]
    print([spans(answer) for answer in mixed], "of", len(answers))
    assert mixed and all(len(spans(answer)) <= 2 for answer in answers)
    for answer in mixed:
        (_, _, end), other_span = spans(answer)
        assert other_span == ("other", end, 60)
        assert answer["meta_info"]["num_retractions"] == 1
    answer = mixed[0]
    end = spans(answer)[0][2]
    ids = answer_prompt(engine, MANY[answers.index(answer)]) + answer["output_ids"][:end]
    params = LONGER | {"max_new_tokens": 60 - end}
    again = engine.generate(input_ids=ids, sampling_params=params)
    assert again["output_ids"] == answer["output_ids"][end:]
    assert outputs(engine) == expected["other"]


def answer_prompt(engine: Engine, text: str) -> list[int]:
    return engine.generate(text, TOKENS | {"max_new_tokens": 1}, return_prompt_token_ids=True)[
        "prompt_token_ids"
    ]


def test_in_place_goes_on_with_what_is_computed_but_leaves_nothing_of_it(engine, expected, other):
    streams = start_many(engine)
    answer = engine.update_weights_from_disk(other, weight_version="other", in_flight="in_place")
    assert answer["num_paused_requests"] >= 1
    answers = [last(stream) for stream in streams]
    mixed = [answer for answer in answers if len(spans(answer)) == 2]
    print([spans(answer) for answer in mixed], "of", len(answers))
    assert mixed and all(a["meta_info"]["num_retractions"] == 0 for a in answers)
    text = MANY[answers.index(mixed[0])]
    # Its pages hold keys and values of both: nobody may find them.
    assert engine.generate(text, TOKENS)["meta_info"]["cached_tokens"] < len(
        answer_prompt(engine, text)
    )
    assert outputs(engine) == expected["other"]
    wait_for(engine.flush_cache, 5)
    engine.update_weights_from_disk(other)
    assert outputs(engine) == expected["other"]


@pytest.mark.parametrize("in_flight", ["abort", "retract", "in_place"])
def test_every_step_in_flight_is_read_before_the_swap(engine, other, monkeypatch, in_flight):
    """What a step has drawn is told under the version that it ran with."""
    runner, unread, at_swap = engine._core._runner, [], []

    def dispatch(plan, dispatch=runner.dispatch):
        unread.append(plan.step)
        return dispatch(plan)

    def read(fresh, read=runner.read):
        unread.pop(0)
        return read(fresh)

    def swap(leaves, swap=runner.swap):
        at_swap.append(list(unread))
        swap(leaves)

    for function in (dispatch, read, swap):
        monkeypatch.setattr(runner, function.__name__, function)
    running = engine.generate(QUESTION, LONGER, stream=True)
    next(running)
    engine.update_weights_from_disk(other, in_flight=in_flight)
    last(running)
    assert at_swap == [[]]


def wait_until_written(engine) -> None:
    """The log has all that the engine has done; a thread writes it a little later."""
    core, recorder = engine._core, engine._core._recorder
    wait_for(lambda: not core.has_work and recorder._written_bytes == recorder._put_bytes, 5)


def test_recorded_run_tells_of_the_other_weights_where_they_came(engine, other):
    """The last steps of a version are read before it, the first ones of the next come after."""
    running = engine.generate(QUESTION, LONGER, stream=True)
    next(running)
    engine.update_weights_from_disk(other, in_flight="retract")
    last(running)
    folder = pathlib.Path(engine._core.info.model_folder)
    plans = pathlib.Path(engine._frontend.config.record_plans)

    wait_until_written(engine)
    with plans.open("rb") as file:
        found = list(PlanLog(file))
    assert isinstance(found[-1], Drawn)
    changes = [i for i, record in enumerate(found) if isinstance(record, WeightsChanged)]
    assert [found[i].folder for i in changes[-2:]] == [str(folder), other]
    before, after = found[: changes[-1]], found[changes[-1] :]
    for part in (before, after):
        dispatched = {record.plan.step for record in part if isinstance(record, PlannedStep)}
        drawn = {record.step for record in part if isinstance(record, Drawn)}
        assert dispatched >= drawn and dispatched


def test_released_weights_that_a_folder_brings_back_can_be_replayed(engine, expected, other):
    plans = pathlib.Path(engine._frontend.config.record_plans)

    def folders() -> list:
        with plans.open("rb") as file:
            return [record.folder for record in PlanLog(file) if isinstance(record, WeightsChanged)]

    wait_until_written(engine)
    count = len(folders())
    for operation in ("release_memory", "resume_memory"):
        engine._frontend.call(operation, tags=["weights"]).result(20)
    engine.update_weights_from_disk(other)
    assert outputs(engine) == expected["other"]
    wait_until_written(engine)
    assert folders()[count:][-1] == other and None not in folders()


def test_unknown_policy_is_refused(engine, other):
    for fields in ({"in_flight": "maybe"}, {"in_flight": "wait", "abort_all_requests": True}):
        with pytest.raises(RequestError) as refused:
            engine.update_weights_from_disk(other, **fields)
        assert refused.value.param == "in_flight"


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_paused_engine_keeps_requests_waiting_and_swaps_at_once(engine, expected, other, mode):
    running = engine.generate(QUESTION, LONGER, stream=True)
    begun = next(running)
    engine.pause_generation(mode)
    assert engine.state.is_paused
    waiting = engine.generate(QUESTION, TOKENS, stream=True)
    time.sleep(0.2)
    began = time.perf_counter()
    engine.update_weights_from_disk(other, weight_version="other")  # waits for nobody
    print(f"updated in {time.perf_counter() - began:.3f} s")
    engine.continue_generation()
    answer = last(waiting)
    assert spans(answer) == [("other", 0, 12)] and answer["output_ids"] == expected["other"][0]
    ended = last(running)
    assert ended["output_ids"][: len(begun["output_ids"])] == begun["output_ids"]
    if mode == "abort":
        assert ended["meta_info"]["finish_reason"]["message"] == "Aborted"
        assert [version for version, *_ in spans(ended)] == ["demo"]
    else:
        assert [version for version, *_ in spans(ended)] == ["demo", "other"]
        assert ended["meta_info"]["num_retractions"] == (mode == "retract")
    assert outputs(engine) == expected["other"]


def test_paused_and_continued_is_as_if_nothing_had_been(engine):
    whole = engine.generate(QUESTION, LONGER)
    for mode in ("retract", "in_place"):
        running = engine.generate(QUESTION, LONGER, stream=True)
        next(running)
        engine.pause_generation(mode)
        engine.pause_generation(mode)  # a second time is no error
        engine.continue_generation()
        assert last(running)["output_ids"] == whole["output_ids"]


def test_keep_pause_leaves_generation_paused(engine, other, expected):
    engine.update_weights_from_disk(other, keep_pause=True)
    waiting = engine.generate(QUESTION, TOKENS, stream=True)
    assert engine.state.is_paused
    engine.continue_generation()
    assert last(waiting)["output_ids"] == expected["other"][0]


def test_request_that_waits_for_an_update_can_be_aborted(engine, other):
    endless = engine.generate(QUESTION, ENDLESS, stream=True)
    next(endless)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        update = pool.submit(engine.update_weights_from_disk, other)
        time.sleep(0.3)
        held = engine.generate(QUESTION, TOKENS, stream=True)
        with pytest.raises(RequestError, match="Another update"):
            engine.update_weights_from_disk(other)
        held.close()
        endless.close()
        update.result(timeout=10)
    assert wait_for(engine.flush_cache, 5)


def test_200_reloads_alternate_exactly_with_flat_memory_and_no_compile(engine, expected, other):
    for path in (other, DEMO_MODEL):
        engine.update_weights_from_disk(path)
        output(engine)
    wait_for(engine.flush_cache, 5)
    wait_for(lambda: not engine._core.has_work, 5)  # a step in flight has arrays of its own
    gc.collect()  # and so has what earlier tests have let fail
    before = live_bytes()
    began = time.perf_counter()
    counter = CompileCounter()
    for i in range(200):
        name, path = ("other", other) if i % 2 else ("demo", DEMO_MODEL)
        engine.update_weights_from_disk(path, weight_version=f"{i}")
        answer = engine.generate(QUESTION, TOKENS)
        assert answer["output_ids"] == expected[name][0], i
        assert spans(answer) == [(f"{i}", 0, 12)]
    counter.close()
    seconds = time.perf_counter() - began
    wait_for(engine.flush_cache, 5)
    wait_for(lambda: not engine._core.has_work, 5)
    print(f"200 reloads in {seconds:.1f} s, {before} bytes before, {live_bytes()} after")
    assert live_bytes() == before
    assert not any(counter.report().values())


def test_arrays_on_the_device_are_swapped_in_at_once(engine, expected, other):
    """What a trainer in this process calls, with all leaves of the model."""
    engine.update_weights_from_disk(other)
    weights = dict(enumerate(engine._core._runner.weights))
    engine.update_weights_from_disk(DEMO_MODEL)
    began = time.perf_counter()
    engine._frontend.call("swap_weights", leaves=weights, weight_version="8").result()
    print(f"swapped in {1e3 * (time.perf_counter() - began):.2f} ms")
    assert outputs(engine) == expected["other"] and engine.state.weight_version == "8"
    wrong = weights | {0: weights[0][:5]}
    with pytest.raises(RequestError, match="weight 0: .* cannot take the place of"):
        engine._frontend.call("swap_weights", leaves=wrong).result()
    assert outputs(engine) == expected["other"]


# Reading what serves.


def test_rows_are_read_up_to_a_number_of_values(engine, monkeypatch):
    def read(most_rows):
        call = engine._frontend.call("read_tensor", name=EMBEDDING, most_rows=most_rows)
        return json.loads(call.result(20))

    rows = read(10**6)
    size = len(rows[0])
    monkeypatch.setattr(served_weights, "MOST_VALUES", 7 * size + 1)
    assert read(7) == rows[:7]
    with pytest.raises(RequestError, match=f"truncate_size may be 7 at most for {EMBEDDING}"):
        read(8)


@pytest.fixture
def slow_reads(engine, monkeypatch):
    """Each takes 0.1 s; gives how many ran at once."""
    running, most = [], []
    of = engine._core._control._served_weights

    def read(checksum=of.checksum):
        running.append(None)
        most.append(len(running))
        time.sleep(0.1)
        running.pop()
        return checksum()

    monkeypatch.setattr(of, "checksum", read)
    return most


def test_readers_that_never_stop_do_not_keep_an_update_waiting(engine, expected, other, slow_reads):
    is_over = threading.Event()

    def poll() -> int:
        count = 0
        while not is_over.is_set():
            engine._frontend.call("checksum").result(30)
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        readers = [pool.submit(poll) for _ in range(8)]
        wait_for(lambda: len(slow_reads) > 4, 10)
        began = time.monotonic()
        update = pool.submit(engine.update_weights_from_disk, other)
        try:
            update.result(10)
        finally:
            seconds = time.monotonic() - began
            is_over.set()
        counts = [reader.result(30) for reader in readers]
    print(f"updated in {seconds:.2f} s while {sum(counts)} reads ran, {max(slow_reads)} at once")
    assert all(counts) and max(slow_reads) == 1
    assert outputs(engine) == expected["other"]


def test_no_more_reads_wait_than_there_is_room_for(engine, monkeypatch, slow_reads):
    monkeypatch.setattr(answer_queue, "MOST_WAITING", 3)
    reads = [engine._frontend.call("checksum") for _ in range(12)]
    concurrent.futures.wait(reads, 20)
    errors = [read.exception() for read in reads if read.exception()]
    print(f"{len(errors)} of 12 refused: {errors[0]}")
    assert errors and {error.status for error in errors} == {503}
    assert len({read.result() for read in reads if not read.exception()}) == 1

"""The engine in this process."""

import asyncio
import concurrent.futures
import threading
import time

import pytest

from jaxserve import Engine
from jaxserve.compiler import working_bytes
from jaxserve.errors import EngineDied, RequestError
from tests.server.serving import DEMO_MODEL, GREEDY, SMALL, programs_folder, wait_for

QUESTION = "What is the capital of France?"
LONG = QUESTION * 12  # 84 tokens: two chunks
MORE = GREEDY | {"ignore_eos": True, "max_new_tokens": 24}
ENDLESS = GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}


@pytest.fixture(scope="module")
def make_engine(pytestconfig):
    folder = programs_folder(pytestconfig)

    def make(**options) -> Engine:
        return Engine(
            **{"model_path": DEMO_MODEL, "compilation_cache_dir": folder} | SMALL | options
        )

    return make


@pytest.fixture(scope="module")
def engine(make_engine):
    with make_engine() as engine:
        yield engine


def is_idle(engine: Engine) -> bool:
    return engine.flush_cache()


def ids_of(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def test_generates(engine):
    answer = engine.generate(QUESTION, GREEDY)
    print(answer)
    assert answer["text"].strip() == "The capital of France is Paris."
    assert list(answer) == ["text", "output_ids", "meta_info"]


def test_knows_what_its_programs_need(engine):
    """The hungriest holds at least the scores of its rows, and never a second KV cache."""
    needed, info = working_bytes(engine._core._runner._programs), engine._core.info
    print(f"{needed / 1e6:.2f} MB of temporary arrays, {info.kv_cache_bytes / 1e6:.2f} MB of cache")
    scores = info.max_running_requests * info.vocab_size * 4
    assert scores <= needed < info.kv_cache_bytes


def test_batch_is_a_list_in_order(engine):
    texts = [QUESTION, LONG, "Once upon a time", QUESTION, "Kenya", QUESTION]
    answers = engine.generate(texts, MORE)
    assert ids_of(answers) == [engine.generate(text, MORE)["output_ids"] for text in texts]
    (one,) = engine.generate([QUESTION], MORE)
    assert one["output_ids"] == answers[0]["output_ids"]


def test_input_ids_and_rids(engine):
    answers = engine.generate(input_ids=[[5, 6], [7]], sampling_params=[MORE, MORE], rid="x")
    assert [answer["meta_info"]["id"] for answer in answers] == ["x_0", "x_1"]
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [2, 1]


def test_stream_grows_to_the_answer(engine):
    whole = engine.generate(QUESTION, MORE)
    got = list(engine.generate(QUESTION, MORE, stream=True))
    assert got[-1]["output_ids"] == whole["output_ids"] and got[-1]["text"] == whole["text"]
    assert all(b["text"].startswith(a["text"]) for a, b in zip(got, got[1:], strict=False))
    assert len(got) > 1
    batch = list(engine.generate([QUESTION, LONG], MORE, stream=True))
    last = {answer["index"]: answer for answer in batch}
    assert last[0]["output_ids"] == whole["output_ids"]
    assert last[1]["output_ids"] == engine.generate(LONG, MORE)["output_ids"]


def test_async_and_async_stream(engine):
    async def main():
        whole, batch = await asyncio.gather(
            engine.async_generate(QUESTION, MORE),
            engine.async_generate([LONG, QUESTION], MORE),
        )
        stream = await engine.async_generate(QUESTION, MORE, stream=True)
        return whole, batch, [answer async for answer in stream]

    whole, batch, got = asyncio.run(main())
    assert whole["output_ids"] == engine.generate(QUESTION, MORE)["output_ids"]
    assert ids_of(batch) == ids_of(engine.generate([LONG, QUESTION], MORE))
    assert got[-1]["output_ids"] == whole["output_ids"] and len(got) > 1


def test_threads_ask_at_the_same_time(engine):
    texts = [QUESTION, LONG, "Once upon a time", "Kenya"] * 5
    alone = ids_of([engine.generate(text, MORE) for text in texts[:4]])
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda text: engine.generate(text, MORE), texts))
    assert ids_of(together) == alone * 5


def test_slow_reader_gets_what_it_missed_in_one_piece(engine):
    answers = engine.generate(QUESTION, MORE | {"max_new_tokens": 100}, stream=True)
    first = next(answers)
    wait_for(lambda: is_idle(engine), 10)
    rest = list(answers)
    print(f"{len(first['output_ids'])} token, then {[len(a['output_ids']) for a in rest]}")
    assert len(rest) <= 2 and len(rest[-1]["output_ids"]) == 100


def test_throughput_does_not_count_the_time_without_work(engine):
    """The log's window of forty decode steps goes on after a pause."""

    def throughput() -> float:
        return engine._frontend.call("internal_state").result()["last_gen_throughput"]

    for _ in range(40):
        before = throughput()
        engine.generate(QUESTION, MORE | {"max_new_tokens": 3})
        if throughput() != before:
            break  # a window has just begun
    began = time.monotonic()
    engine.generate(QUESTION, MORE | {"max_new_tokens": 31})
    seconds = time.monotonic() - began
    time.sleep(1)
    engine.generate(QUESTION, MORE | {"max_new_tokens": 16})
    print(f"{throughput():.0f} tokens/s after a pause, 30 in {seconds:.2f} s before it")
    assert throughput() > 0.2 * 30 / seconds


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_a_stream_frees_its_row(engine, taken):
    answers = engine.generate(QUESTION, ENDLESS, stream=True)
    for _ in range(taken):
        next(answers)
    assert not is_idle(engine)
    answers.close()
    wait_for(lambda: is_idle(engine), 5)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_an_async_stream_frees_its_row(engine, taken):
    async def main():
        answers = await engine.async_generate(QUESTION, ENDLESS, stream=True)
        for _ in range(taken):
            await anext(answers)
        assert not is_idle(engine)
        await answers.aclose()
        wait_for(lambda: is_idle(engine), 5)

    asyncio.run(main())


def test_cancelling_an_async_call_frees_its_rows(engine):
    async def main():
        call = asyncio.create_task(engine.async_generate([QUESTION] * 6, ENDLESS))
        while is_idle(engine):
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    wait_for(lambda: is_idle(engine), 5)


def test_event_loop_that_ends_during_its_call_harms_nobody(engine):
    """And an iterator that nobody has advanced is still one that can be dropped."""

    async def leave():
        return await engine.async_generate(QUESTION, MORE | {"max_new_tokens": 200}, stream=True)

    answers = asyncio.run(leave())
    assert engine.generate(QUESTION, GREEDY)["text"]
    del answers
    wait_for(lambda: is_idle(engine), 10)
    assert engine.generate(QUESTION, GREEDY)["text"]


def test_flush_cache_is_refused_while_a_request_runs(engine):
    answers = engine.generate(QUESTION, ENDLESS, stream=True)
    next(answers)
    assert engine.flush_cache() is False
    answers.close()
    wait_for(engine.flush_cache, 5)


@pytest.mark.parametrize(
    "arguments,param",
    [
        ({}, None),
        ({"prompt": 5}, "text"),
        ({"prompt": "a", "sampling_params": {"top_p": 2}}, "top_p"),
        ({"input_ids": [5000]}, "input_ids"),
        ({"prompt": [QUESTION, None]}, "text"),
    ],
)
def test_bad_request_raises_and_names_the_field(engine, arguments, param):
    with pytest.raises(RequestError) as refused:
        engine.generate(**arguments)
    print(refused.value)
    assert refused.value.param == param
    assert is_idle(engine)


def test_two_engines_in_one_process(engine, make_engine):
    texts = [QUESTION, LONG, "Once upon a time"]
    with make_engine() as second, concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda e: ids_of(e.generate(texts, MORE)), (engine, second)))
    assert both[0] == both[1]
    assert engine.generate(QUESTION, GREEDY)["text"], "it outlives the other's end"


def test_shutdown_ends_what_waits_and_what_comes_after(make_engine):
    engine = make_engine()
    errors = []

    def ask(stream: bool) -> None:
        try:
            answer = engine.generate(QUESTION, ENDLESS, stream=stream)
            errors.append(list(answer))
        except EngineDied as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True) * 3]
    for thread in threads:
        thread.start()
    wait_for(lambda: not is_idle(engine), 10)
    began = time.monotonic()
    engine.shutdown()
    for thread in threads:
        thread.join(10)
    print(f"{len(errors)} calls ended {time.monotonic() - began:.2f} s after shutdown: {errors[0]}")
    assert time.monotonic() - began < 5
    assert len(errors) == 6 and all(isinstance(error, EngineDied) for error in errors)
    with pytest.raises(EngineDied, match="was shut down"):
        engine.generate(QUESTION)
    with pytest.raises(EngineDied, match="was shut down"):
        engine.flush_cache()
    engine.shutdown()  # a second time is no error


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"model_path": "/no/such/model"}, FileNotFoundError, "/no/such/model is no folder"),
        ({"weights_root": "/no/root"}, ValueError, "--weights-root /no/root is no folder"),
        ({"page_size": 0}, ValueError, "--page-size 0: must be from 1 to 128"),
        ({"max_total_tokens": 2**31 - 1}, ValueError, "lower it to at most"),
        ({"device": "tpu"}, ValueError, "--device tpu: JAX runs on cpu here"),
        ({"tokenizer_path": "/no/tokenizer"}, FileNotFoundError, "/no/tokenizer is no folder"),
        ({"preferred_sampling_params": "[]"}, ValueError, "must be a JSON object"),
    ],
)
def test_engine_that_cannot_be_made_says_why(make_engine, options, error, words):
    with pytest.raises(error, match=words):
        make_engine(**options)

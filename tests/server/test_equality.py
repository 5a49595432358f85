"""In this process or over HTTP, streamed or not, one at a time or many: the same tokens, and
logprobs within 1e-4. tests/engine/test_equality.py has the other ways in which answers must not
differ; these are compared with the same oracle."""

import asyncio
import concurrent.futures
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from jaxserve import Engine
from jaxserve.request import FinishReason, Logprobs, Request
from tests.engine.cast import make_cast
from tests.engine.oracle import Answer, Oracle
from tests.server.serving import DEMO_MODEL, SMALL, generate, programs_folder, stream

THREADS = 8


@pytest.fixture(scope="module")
def engine(pytestconfig) -> Iterator[Engine]:
    folder = programs_folder(pytestconfig)
    with Engine(model_path=DEMO_MODEL, compilation_cache_dir=folder, **SMALL) as engine:
        yield engine


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(DEMO_MODEL)


@pytest.fixture(scope="module")
def cast(oracle, engine) -> list[Request]:
    def pick(make) -> Request:
        return oracle.pick(make, lambda one: read(one, engine.generate(**body_of(one))))

    return make_cast(22, oracle.config.vocab_size, pick)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({}, id="small"),
        *(
            pytest.param(options, id=f"page{options['page_size']}", marks=pytest.mark.matrix)
            for options in (
                {"page_size": 1, "num_continuous_decode_steps": 8},
                {"page_size": 64, "num_continuous_decode_steps": 4, "chunked_prefill_size": 12},
            )
        ),
    ],
)
def served(request, start) -> Iterator[httpx.Client]:
    """A server's client; the server of all other tests comes first."""
    if not request.param:
        yield request.getfixturevalue("client")
        return
    with start(**request.param) as server, server.client() as client:
        yield client


def body_of(request: Request) -> dict[str, Any]:
    """As /generate takes it, and `Engine.generate` as keywords."""
    told, sampling = request.logprobs, msgspec.to_builtins(request.sampling, str_keys=True)
    return {
        "rid": request.rid,
        "input_ids": request.prompt_ids,
        "sampling_params": sampling | {"sampling_seed": request.seed},
        "return_logprob": told is not None,
        "logprob_start_len": told.start if told else -1,
        "top_logprobs_num": told.top_num if told else 0,
        "token_ids_logprob": list(told.token_ids) if told else [],
    }


def batch_of(requests: list[Request]) -> dict[str, Any]:
    bodies = [body_of(request) for request in requests]
    return {name: [body[name] for body in bodies] for name in bodies[0]}


def read(request: Request, answer: dict[str, Any]) -> Answer:
    """What /generate answers."""
    meta = answer["meta_info"]
    assert meta["id"] == request.rid and meta["prompt_tokens"] == len(request.prompt_ids)
    told, prompt_told = [], []
    if request.logprobs is not None:
        told = [read_logprobs(meta, "output", slice(None))]
        prompt_told = [read_logprobs(meta, "input", slice(1, None))]  # nothing leads to the first
    return Answer(
        request,
        answer["output_ids"],
        told,
        prompt_told,
        FinishReason(**meta["finish_reason"]),
        meta["cached_tokens"],
        meta["num_retractions"],
    )


def read_logprobs(meta: dict[str, Any], side: str, known: slice) -> Logprobs:
    tops = meta.get(f"{side}_top_logprobs", [])[known]
    probes = meta.get(f"{side}_token_ids_logprobs", [])[known]
    return Logprobs(
        [value for value, *_ in meta[f"{side}_token_logprobs"][known]],
        [[(value, token) for value, token, _ in top] for top in tops],
        [[value for value, *_ in probe] for probe in probes],
    )


def last_of(request: Request, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a stream, whose events each tell all there is so far."""
    outputs = [event["output_ids"] for event in events]
    assert all(a == b[: len(a)] and len(a) < len(b) for a, b in zip(outputs, outputs[1:]))  # noqa: B905
    assert len(events) > 1 or len(outputs[0]) == request.max_new_tokens
    return events[-1]


def check(oracle: Oracle, requests: list[Request], answers: list[dict[str, Any]]) -> list[Answer]:
    read_answers = [read(*pair) for pair in zip(requests, answers, strict=True)]
    for answer in read_answers:
        oracle.check(answer)
    print(f"cached {[answer.cached_tokens for answer in read_answers]}")
    return read_answers


def test_engine_one_at_a_time(engine, oracle, cast):
    assert engine.flush_cache()
    check(oracle, cast, [engine.generate(**body_of(request)) for request in cast])
    again = check(oracle, cast, [engine.generate(**body_of(request)) for request in cast])
    assert sum(answer.cached_tokens for answer in again) > 100


def test_engine_batch(engine, oracle, cast):
    check(oracle, cast, engine.generate(**batch_of(cast)))


def test_engine_stream(engine, oracle, cast):
    events = [list(engine.generate(**body_of(request), stream=True)) for request in cast]
    print(f"events {[len(some) for some in events]}")
    check(oracle, cast, [last_of(*pair) for pair in zip(cast, events, strict=True)])


def test_engine_async(engine, oracle, cast):
    async def main() -> list[dict[str, Any]]:
        return await asyncio.gather(*(engine.async_generate(**body_of(one)) for one in cast))

    check(oracle, cast, asyncio.run(main()))


def test_server_one_at_a_time(served, oracle, cast):
    served.post("/flush_cache").raise_for_status()
    check(oracle, cast, [generate(served, **body_of(request)) for request in cast])
    again = check(oracle, cast, [generate(served, **body_of(request)) for request in cast])
    assert sum(answer.cached_tokens for answer in again) > 100


def test_server_batch(served, oracle, cast):
    check(oracle, cast, generate(served, **batch_of(cast)))


def test_server_stream(served, oracle, cast):
    events = [stream(served, **body_of(request)) for request in cast]
    print(f"events {[len(some) for some in events]}")
    check(oracle, cast, [last_of(*pair) for pair in zip(cast, events, strict=True)])


def test_server_batch_stream(served, oracle, cast):
    events = stream(served, **batch_of(cast))
    print(f"{len(events)} events of {len(cast)} requests")
    answers = []
    for index, request in enumerate(cast):
        answers.append(last_of(request, [event for event in events if event["index"] == index]))
    check(oracle, cast, answers)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
def test_server_many_clients(served, oracle, cast, is_stream):
    def ask(request: Request) -> dict[str, Any]:
        with httpx.Client(base_url=served.base_url, timeout=60.0) as own:
            body = body_of(request)
            return last_of(request, stream(own, **body)) if is_stream else generate(own, **body)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        check(oracle, cast, list(pool.map(ask, cast)))

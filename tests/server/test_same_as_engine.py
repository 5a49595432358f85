"""The server's tokens are those of the engine in a process of its own or in ours."""

import pytest

from jaxserve import Engine
from tests.server.serving import DEMO_MODEL, GREEDY, SMALL, generate, programs_folder

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def engine(pytestconfig):
    folder = programs_folder(pytestconfig)
    with Engine(model_path=DEMO_MODEL, compilation_cache_dir=folder, **SMALL) as engine:
        yield engine


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        GREEDY | {"ignore_eos": True, "max_new_tokens": 60},
        {"temperature": 3.0, "sampling_seed": 5, "ignore_eos": True, "max_new_tokens": 60},
        {"temperature": 1.0, "sampling_seed": 6, "top_k": 40, "top_p": 0.9, "stop": ["Paris"]},
    ],
    ids=["greedy", "long", "hot", "stop"],
)
def test_server_and_engine_give_the_same_answer(engine, client, sampling):
    texts = [QUESTION, QUESTION * 12, "Once upon a time"]
    here = engine.generate(texts, sampling, rid="same")
    there = generate(client, text=texts, sampling_params=sampling, rid="same")
    for answer in (*here, *there):
        # Times, and what earlier requests have left in the prefix cache, differ.
        for key in ("response_sent_to_client_ts", "e2e_latency", "cached_tokens"):
            del answer["meta_info"][key]
    print([answer["text"] for answer in there])
    assert here == there

"""/encode, /classify and /v1/embeddings of a causal model that is served for its vectors."""

import concurrent.futures
import re
import subprocess

import numpy as np
import openai
import pytest

from tests.server import trainee
from tests.server.serving import wait_for

TEXTS = ["What is the capital of France?", "Once upon a time", "5 + 7 ="]
LONG = "What is the capital of France? " * 10  # several chunks
SIZE = 128
META_INFO = [
    "id",
    "finish_reason",
    "prompt_tokens",
    "weight_version",
    "num_retractions",
    "e2e_latency",
    "response_sent_to_client_ts",
]
PREFILL = r"Prefill batch\. #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)"
NO_EMBEDDINGS = (
    "This model does not appear to be an embedding model by default. Please add "
    "`--is-embedding` when launching the server or try another model."
)


@pytest.fixture(scope="module")
def server(start, weights_folder):
    overrides = '{"is_matryoshka": true, "matryoshka_dimensions": [16, 64]}'
    with start(
        is_embedding=True, json_model_override_args=overrides, weights_root=weights_folder
    ) as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def encode(client, path: str = "/encode", method: str = "POST", **body):
    response = client.request(method, path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def vector(client, text: str, **fields) -> np.ndarray:
    return np.array(encode(client, text=text, **fields)["embedding"], np.float32)


def error(client, path: str = "/encode", **body) -> dict:
    response = client.post(path, json=body)
    print(response.text)
    assert response.status_code == 400
    return response.json()["error"]


def steps(output: str) -> list[tuple[int, ...]]:
    """New sequences, new tokens and cached tokens of each step with prompts."""
    return [tuple(map(int, line.groups())) for line in re.finditer(PREFILL, output)]


def test_one_text_is_answered_with_an_object_in_the_contracts_shape(client):
    answer = encode(client, model="some/model", text=TEXTS[0], something_else=1, rid="mine")
    assert list(answer) == ["embedding", "meta_info"]
    assert list(answer["meta_info"]) == META_INFO
    meta = answer["meta_info"]
    assert meta["id"] == "mine" and meta["finish_reason"] == {"type": "length", "length": 0}
    assert (meta["prompt_tokens"], meta["weight_version"]) == (7, "default")
    assert len(answer["embedding"]) == SIZE
    assert np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-6)


def test_a_list_is_answered_in_order_and_one_of_one_with_a_list(client):
    alone = [vector(client, text) for text in TEXTS]
    together = encode(client, text=TEXTS, rid=["a", "b", "c"])
    assert [answer["meta_info"]["id"] for answer in together] == ["a", "b", "c"]
    for one, answer in zip(alone, together, strict=True):
        np.testing.assert_allclose(answer["embedding"], one, atol=1e-6)
    assert abs(alone[0] - alone[1]).max() > 0.01
    (single,) = encode(client, text=TEXTS[:1])
    np.testing.assert_allclose(single["embedding"], alone[0], atol=1e-6)


@pytest.mark.parametrize("path", ["/encode", "/classify"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_both_paths_and_methods_take_ids_as_text(client, path, method):
    ids = [[261, 262, 263, 264], [300]]
    first, second = encode(client, path, method, input_ids=ids)
    alone = encode(client, path, method, input_ids=ids[0])
    np.testing.assert_allclose(first["embedding"], alone["embedding"], atol=1e-6)
    assert [one["meta_info"]["prompt_tokens"] for one in (first, second)] == [4, 1]


def test_sampling_params_are_checked_and_have_no_effect(client):
    plain = vector(client, TEXTS[0])
    params = {"max_new_tokens": 7, "temperature": 2.0, "stop": ["x"]}
    np.testing.assert_allclose(vector(client, TEXTS[0], sampling_params=params), plain, atol=1e-6)
    batch = encode(client, text=TEXTS[:2], sampling_params=[params, {}])
    assert len(batch) == 2
    assert error(client, text="x", sampling_params={"top_p": 7})["param"] == "top_p"


@pytest.mark.parametrize(
    "body, words",
    [
        ({}, "At least one of text, input_ids, image, video, or audio should be provided"),
        (
            {"text": "a", "input_ids": [1]},
            "text and input_ids cannot be provided at the same time",
        ),
        ({"text": []}, "text cannot be empty."),
        ({"text": [["query", "document"]]}, "text must be a string or a list of strings"),
        ({"input_ids": [10**6]}, "out-of-vocabulary"),
        ({"text": "a", "image_data": "x"}, "image_data is not supported"),
        ({"text": "a", "dimensions": 0}, "dimensions must be a positive integer"),
        ({"text": "a", "dimensions": 999}, "dimensions must be at most 128"),
        ({"text": "a", "dimensions": 17}, "dimensions must be one of [16, 64]"),
        ({"text": ["a", "b"], "rid": ["x"]}, "1 rids for 2 prompts"),
        ({"input_ids": [5] * 4096}, "is longer than the model's context length (4096 tokens)."),
        ({"text": ["a"] * 2049}, "at most 2048 prompts"),
    ],
)
def test_bad_bodies_are_refused_in_words(client, body, words):
    assert words in error(client, **body)["message"]


def test_dimensions_are_the_first_numbers_normalized_again(client):
    whole = vector(client, TEXTS[0])
    cut = vector(client, TEXTS[0], dimensions=16)
    np.testing.assert_allclose(cut, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-6)


def test_a_server_does_what_it_was_launched_for(client, request):
    words = error(client, "/generate", text="a")["message"]
    assert "POST /encode" in words and "--is-embedding" in words
    assert client.get("/get_model_info").json()["is_generation"] is False
    generating = request.getfixturevalue("weights_client")  # which other tests have too
    for path in ("/encode", "/classify"):
        assert error(generating, path, text="a")["message"] == NO_EMBEDDINGS
    assert error(generating, "/v1/embeddings", input="a")["message"] == NO_EMBEDDINGS


def test_a_prefix_is_cached_and_long_texts_take_several_steps(server, client):
    assert client.post("/flush_cache").status_code == 200
    before = len(server.output)
    first = vector(client, LONG)
    chunks = steps(server.output[before:])
    before = len(server.output)
    again = vector(client, LONG)
    (cached,) = steps(server.output[before:])
    print(f"{chunks}, then {cached}")
    assert len(chunks) > 1 and not any(step[2] for step in chunks)
    assert cached[1] == 1 and cached[2] == sum(step[1] for step in chunks) - 1
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_many_at_once_share_steps(server, client):
    alone = {text: vector(client, text) for text in TEXTS}
    before = len(server.output)
    texts = TEXTS * 8
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: vector(client, text), texts))
    for text, one in zip(texts, found, strict=True):
        np.testing.assert_allclose(one, alone[text], atol=1e-6)
    most = max(step[0] for step in steps(server.output[before:]))
    print(f"up to {most} texts in a step")
    assert most > 1


def test_health_ready_and_info_without_compiling(server, client):
    before = len(server.output)
    assert client.get("/health_generate").status_code == 200
    (step,) = wait_for(lambda: steps(server.output[before:]), 5)
    assert step == (1, 1, 0)
    assert client.get("/ready").status_code == 200
    (state,) = client.get("/get_server_info").json()["internal_states"]
    assert state["compiled_after_ready"] == state["traced_after_ready"] == 0
    print(f"{state['compiled_at_start']} programs compiled at the start")


def test_curl_line_of_the_banner_works_as_it_is_printed(server, client):
    (command,) = re.findall(r"^  (curl .*\\\n.*)$", server.output, re.MULTILINE)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith('{"embedding":['), done.stdout + done.stderr


def test_client_of_openai(server, client):
    alone = [vector(client, text) for text in TEXTS]
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = api.embeddings.create(model="some", input=TEXTS)  # asks for base64
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, one in zip(answer.data, alone, strict=True):
        np.testing.assert_allclose(item.embedding, one, atol=1e-6)
    tokens = sum(one["meta_info"]["prompt_tokens"] for one in encode(client, text=TEXTS))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    options = {"model": "some", "encoding_format": "float", "dimensions": 64}
    cut = api.embeddings.create(input=TEXTS[0], **options).data[0].embedding
    np.testing.assert_allclose(cut, vector(client, TEXTS[0], dimensions=64), atol=1e-6)
    for ids in ([261, 262], [[261, 262]]):
        (item,) = api.embeddings.create(model="some", input=ids).data
        expected = encode(client, input_ids=[261, 262])["embedding"]
        np.testing.assert_allclose(item.embedding, expected, atol=1e-6)


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [10**7]}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "encoding_format": []}, "encoding_format"),
        ({"input": "a", "model": {}}, "model"),
    ],
)
def test_bad_bodies_of_openai_are_refused_in_words(client, body, param):
    assert error(client, "/v1/embeddings", **body)["param"] == param


def test_an_embedding_is_no_score(client):
    response = client.post("/v1/score", json={"query": "a", "items": ["b"]})
    assert response.status_code == 400 and "no scores" in response.json()["error"]["message"]


def test_new_weights_give_other_vectors_and_the_old_ones_the_same(client, demo, other):
    first = vector(client, LONG)
    trainee.update(client, model_path=other, weight_version="other")
    answer = encode(client, text=LONG)
    assert answer["meta_info"]["weight_version"] == "other"
    distance = abs(np.array(answer["embedding"]) - first).max()
    trainee.update(client, model_path=demo, weight_version="default")
    print(f"largest difference of a number by the new weights: {distance:.3f}")
    assert distance > 0.01
    np.testing.assert_allclose(vector(client, LONG), first, atol=1e-6)


def test_pause_keeps_texts_waiting_and_an_abort_is_an_error(client):
    client.post("/pause_generation", json={"mode": "retract"}).raise_for_status()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/encode", json={"text": TEXTS[0]})
        wait_for(lambda: trainee.state(client)["num_queue_reqs"] == 1, 5)
        client.post("/pause_generation", json={"mode": "abort"}).raise_for_status()
        answer = waiting.result(timeout=10)
    client.post("/continue_generation").raise_for_status()
    print(answer.status_code, answer.text)
    assert answer.status_code == 503 and "Abort" in answer.json()["error"]["message"]
    assert vector(client, TEXTS[0]).shape == (SIZE,)

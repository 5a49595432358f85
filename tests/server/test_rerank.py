"""A cross-encoder over HTTP: /v1/rerank, /v1/classify, /v1/score, pairs in /encode."""

import math

import numpy as np
import pytest

from tests.golden.pooled.encoders import ENCODER_CASES, PAIRS
from tests.golden.pooled.golden import read_golden

CASE = next(case for case in ENCODER_CASES if case.name == "bert_pairs")
SCORES = read_golden(CASE.name).vectors[:, 0]
QUERY = PAIRS[0][0]
DOCUMENTS = [PAIRS[0][1], PAIRS[1][1], PAIRS[2][1]]


@pytest.fixture(scope="module")
def client(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reranker")
    CASE.write(folder)
    with start(model_path=str(folder)) as server, server.client() as client:
        client.server = server
        yield client


def post(client, path: str, **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def scores_of(client, pairs) -> list[float]:
    return [one["embedding"][0] for one in post(client, "/encode", text=pairs)]


@pytest.mark.parametrize("path", ["/encode", "/classify"])
def test_pairs_have_the_scores_of_transformers(client, path):
    answers = post(client, path, text=[list(pair) for pair in PAIRS], rid=["a", "b", "c"])
    assert [one["meta_info"]["id"] for one in answers] == ["a", "b", "c"]
    np.testing.assert_allclose([one["embedding"][0] for one in answers], SCORES, rtol=1e-4)


def test_one_pair_is_told_from_two_texts_by_the_flag(client):
    one = post(client, "/encode", text=list(PAIRS[0]), is_cross_encoder_request=True)
    assert one["embedding"] == pytest.approx(SCORES[:1], rel=1e-4)
    two = post(client, "/encode", text=list(PAIRS[0]))
    assert len(two) == 2
    listed = post(client, "/encode", text=[list(PAIRS[0])], is_cross_encoder_request=True)
    assert len(listed) == 1 and listed[0]["embedding"] == pytest.approx(SCORES[:1], rel=1e-4)


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_documents_come_back_in_the_order_of_their_scores(client, method):
    expected = scores_of(client, [[QUERY, one] for one in DOCUMENTS])
    response = client.request(
        method, "/v1/rerank", json={"model": "x", "query": QUERY, "documents": DOCUMENTS}
    )
    ranked = response.json()
    print([(one["index"], one["score"]) for one in ranked])
    order = sorted(range(3), key=lambda i: -expected[i])
    assert order != [0, 1, 2], "or the order would show nothing"
    assert [one["index"] for one in ranked] == order
    for one in ranked:
        assert list(one) == ["score", "document", "index", "meta_info"]
        assert one["document"] == DOCUMENTS[one["index"]]
        assert one["score"] == pytest.approx(expected[one["index"]], rel=1e-5)
        assert one["meta_info"]["prompt_tokens"] > 0


def test_fewer_documents_and_none_of_their_texts(client):
    body = {"query": QUERY, "documents": DOCUMENTS}
    whole = post(client, "/v1/rerank", **body)
    best = post(client, "/v1/rerank", **body, top_n=2, return_documents=False)
    assert [one["index"] for one in best] == [one["index"] for one in whole[:2]]
    assert all(one["document"] is None for one in best)


def test_score_of_texts_is_that_of_pairs(client):
    answer = post(client, "/v1/score", query=QUERY, items=DOCUMENTS)
    expected = scores_of(client, [[QUERY, one] for one in DOCUMENTS])
    np.testing.assert_allclose(answer["scores"], np.array(expected)[:, None], rtol=1e-5)
    turned = post(client, "/v1/score", query=QUERY, items=DOCUMENTS[1], item_first=True)
    other = scores_of(client, [[DOCUMENTS[1], QUERY]])
    np.testing.assert_allclose(turned["scores"], [other], rtol=1e-5)
    assert other[0] != pytest.approx(expected[1], rel=1e-3), "the two types are told apart"


def test_probability_of_one_label(client):
    answer = post(client, "/v1/classify", input=[list(PAIRS[0])], model="mine")
    (item,) = answer["data"]
    assert (item["label"], item["num_classes"], item["index"]) == ("LABEL_0", 1, 0)
    assert item["probs"] == pytest.approx([1 / (1 + math.exp(-SCORES[0]))], rel=1e-4)
    assert answer["model"] == "mine" and answer["usage"]["prompt_tokens"] > 0
    single = post(client, "/v1/classify", input=QUERY)
    assert single["data"][0]["probs"] != item["probs"]


@pytest.mark.parametrize(
    "path, body, words",
    [
        ("/v1/rerank", {"query": QUERY}, "documents must be a list of strings"),
        ("/v1/rerank", {"query": QUERY, "documents": []}, "documents must be"),
        ("/v1/rerank", {"query": [QUERY], "documents": ["a"]}, "query must be a string"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "instruct": "c"}, "instruct"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n must be positive"),
        ("/v1/rerank", {"query": "a", "documents": ["b " * 200]}, "longer than the model's"),
        ("/encode", {"text": [["a", "b"], "c"]}, "text must be a list of pairs"),
        ("/encode", {"text": [["a", "b", "c"]]}, "text must be a list of pairs"),
        ("/encode", {"text": "a", "is_cross_encoder_request": True}, "list of pairs"),
        ("/encode", {"text": "a", "is_cross_encoder_request": 1}, "must be a boolean"),
        ("/generate", {"text": "a"}, "answers with embeddings"),
    ],
)
def test_bad_bodies_are_refused_in_words(client, path, body, words):
    response = client.post(path, json=body)
    print(response.text)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"].replace("a positive integer", "positive")


def test_health_and_nothing_compiled_after_ready(client):
    assert client.get("/health_generate").status_code == 200
    info = client.get("/get_server_info").json()
    (state,) = info["internal_states"]
    assert state["compiled_after_ready"] == state["traced_after_ready"] == 0
    assert state["memory_usage"]["kvcache"] == 0 and info["max_req_input_len"] == 128
    assert "No KV cache" in client.server.output

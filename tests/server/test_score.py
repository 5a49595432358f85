"""/v1/score of a model that predicts tokens and of a classifier, and the page's reward cell."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.golden.cases import LLAMA
from tests.golden.pooled.cases import Case, labelled
from tests.server.serving import DEMO_MODEL, generate

QUERY, ITEMS = "What is the capital of ", ["France?", "Peru?", "Kenya?"]
LABELS = [261, 300, 412]
PROMPT = "What is the range of the numeric output of a sigmoid node in a neural network?"
RESPONSES = [f"The output of a sigmoid node is bounded between {low} and 1." for low in (-1, 0)]


@pytest.fixture(scope="module")
def reward_client(start, tmp_path_factory):
    """A classifier with three labels and the demo model's tokenizer."""
    config = labelled(LLAMA | {"vocab_size": 1024}, "LlamaForSequenceClassification", 3)
    folder = tmp_path_factory.mktemp("reward")
    Case("reward", config, seed=801).write(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{DEMO_MODEL}/{name}", folder)
    with start(model_path=str(folder)) as server, server.client() as client:
        client.server = server
        yield client


def score(client, **body) -> list[list[float]]:
    response = client.post("/v1/score", json={"query": QUERY, "items": ITEMS, **body})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["scores", "model", "usage", "object"]
    assert answer["object"] == "scoring" and answer["usage"]["prompt_tokens"] > 0
    return answer["scores"]


def softmax(rows) -> np.ndarray:
    exponentials = np.exp(np.array(rows) - np.max(rows, axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_probabilities_of_labels(client):
    found = np.array(score(client, label_token_ids=LABELS))
    assert found.shape == (3, 3) and (found > 0).all() and (found < 1).all()
    for item, row in zip(ITEMS, found, strict=True):
        answer = generate(
            client,
            text=QUERY + item,
            sampling_params={"temperature": 1.0, "max_new_tokens": 1},
            return_logprob=True,
            token_ids_logprob=LABELS,
        )
        (logprobs,) = answer["meta_info"]["output_token_ids_logprobs"]
        np.testing.assert_allclose(row, np.exp([one[0] for one in logprobs]), rtol=1e-4)
    shares = score(client, label_token_ids=LABELS, apply_softmax=True)
    np.testing.assert_allclose(shares, softmax(np.log(found)), rtol=1e-4)


def test_items_first_and_ids(client):
    turned = score(client, query="?", items="Peru", label_token_ids=LABELS, item_first=True)
    plain = score(client, query="Peru", items=["?"], label_token_ids=LABELS)
    np.testing.assert_allclose(turned, plain, rtol=1e-5)
    ids = score(client, query=[300, 301], items=[[302], [303]], label_token_ids=LABELS)
    alone = score(client, query=[300, 301], items=[[303]], label_token_ids=LABELS)
    np.testing.assert_allclose(ids[1], alone[0], rtol=1e-4)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"query": None}, "query"),
        ({"items": [[1]]}, "items"),
        ({"items": None}, "items"),
        ({"label_token_ids": None}, "label_token_ids"),
        ({"apply_softmax": "yes"}, "apply_softmax"),
        ({"items": []}, "items"),
        ({"items": ["a"] * 300}, "items"),
        ({"items": ["a" * 100_000]}, "items"),
        ({"label_token_ids": [10**6]}, "label_token_ids"),
        ({"label_token_ids": ["x"]}, "label_token_ids"),
        ({"label_token_ids": [5] * 200}, "label_token_ids"),
        ({"model": 5}, "model"),
    ],
)
def test_bad_bodies_are_refused_in_words(client, body, param):
    given = {"query": QUERY, "items": ITEMS, "label_token_ids": LABELS} | body
    response = client.post("/v1/score", json=given)
    print(response.text)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    words = response.json()["error"]["message"]
    assert param in words or "characters) is longer than" in words or "prompts in a" in words


def test_scores_of_a_classifier_are_what_it_says(reward_client):
    texts = [QUERY + item for item in ITEMS]
    encoded = reward_client.post("/classify", json={"text": texts}).json()
    found = score(reward_client)
    np.testing.assert_allclose(found, [one["embedding"] for one in encoded], rtol=1e-5)
    shares = score(reward_client, apply_softmax=True)
    np.testing.assert_allclose(shares, softmax(found), rtol=1e-5)


def test_probabilities_of_three_labels_and_no_reranking(reward_client, client):
    texts = [QUERY + item for item in ITEMS]
    answer = reward_client.post("/v1/classify", json={"input": texts}).json()
    shares = score(reward_client, apply_softmax=True)
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    for one, row in zip(answer["data"], shares, strict=True):
        np.testing.assert_allclose(one["probs"], row, rtol=1e-5)
        assert one["label"] == f"LABEL_{np.argmax(row)}" and one["num_classes"] == 3
    ranking = {"query": QUERY, "documents": ITEMS}
    for other, path, body, words in [
        (reward_client, "/v1/rerank", ranking, "is no cross-encoder"),
        (client, "/v1/rerank", ranking, "is no cross-encoder"),
        (client, "/v1/classify", {"input": "a"}, "has no labels"),
    ]:
        response = other.post(path, json=body)
        print(response.text)
        assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_reward_cell_of_the_page(reward_client):
    """Two conversations in one call, in their order; the second one takes from the cache what it
    shares with the first."""
    prompts = [f"<|user|>{PROMPT}<|assistant|>{response}" for response in RESPONSES]
    data = {"model": "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", "text": prompts}
    server = reward_client.server
    reward_client.post("/flush_cache").raise_for_status()
    before, again = len(server.output), []
    responses = reward_client.post("/classify", json=data).json()
    cached = [int(one) for one in re.findall(r"#cached-token: (\d+)", server.output[before:])]
    print(f"cached tokens: {cached}")
    assert max(cached) > 20
    rewards = [response["embedding"][0] for response in responses]
    print(f"rewards: {rewards}")
    assert all(len(response["embedding"]) == 3 for response in responses)
    assert abs(rewards[0] - rewards[1]) > 1e-3
    reward_client.post("/flush_cache").raise_for_status()
    for prompt in prompts:
        again.append(reward_client.post("/classify", json={"text": prompt}).json())
    np.testing.assert_allclose([one["embedding"][0] for one in again], rewards, rtol=1e-4)
    info = reward_client.get("/model_info").json()
    assert info["is_generation"] is False
    assert info["architectures"] == ["LlamaForSequenceClassification"], json.dumps(info)

"""What trainers call beside updates: labels, memory, groups; whole flows."""

import concurrent.futures

import pytest

from tests.engine.reloading import QUESTION
from tests.server.serving import GREEDY, generate, num_running, open_stream, wait_for
from tests.server.trainee import (
    ENDLESS,
    ask,
    buckets,
    checksum,
    send,
    state,
    tensors_of,
    update,
)

pytestmark = pytest.mark.usefixtures("demo_weights")


@pytest.fixture(scope="module")
def client(weights_client):
    return weights_client


def test_label_changes_by_itself(client):
    with open_stream(client, text=QUESTION, sampling_params=ENDLESS) as answers:
        body = {"new_version": "5", "abort_all_requests": False}
        answer = client.post("/update_weight_version", json=body).json()
        assert answer == {
            "success": True,
            "message": "Weight version updated to 5",
            "new_version": "5",
        }
        wait_for(lambda: next(answers)["meta_info"]["weight_version"] == "5", 5)
        client.post("/update_weight_version", json={"new_version": "6"}).raise_for_status()
        last = list(answers)[-1]["meta_info"]
        assert last["finish_reason"]["message"] == "Aborted"
        assert [span["version"] for span in last["weight_versions"]] == ["demo", "5"]
    assert ask(client)["meta_info"]["weight_version"] == "6"
    assert ask(client)["meta_info"]["cached_tokens"] > 0, "the weights are the same"
    for body in ({}, {"new_version": 7}, {"new_version": ""}):
        assert client.post("/update_weight_version", json=body).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "init_weights_update_group",
        "destroy_weights_update_group",
        "update_weights_from_distributed",
    ],
)
def test_process_groups_are_refused_in_words(client, path):
    response = client.post(f"/{path}", json={"names": ["x"], "group_name": "g"})
    assert response.status_code == 501
    assert response.json()["success"] is False and "NCCL" in response.json()["message"]


def test_released_memory_is_told_and_taken_back(client, texts):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {"text": QUESTION, "sampling_params": ENDLESS | {"max_new_tokens": 1500}}
        running = pool.submit(generate, client, **body)
        wait_for(lambda: num_running(client), 5)
        response = client.post("/release_memory_occupation", json={"tags": ["kv_cache"]})
        assert response.status_code == 200 and response.content == b"null"
        response = client.post("/generate", json={"text": QUESTION})
        assert response.status_code == 503
        assert response.json()["error"]["message"] == (
            "the memory of kv_cache is released; POST /resume_memory_occupation takes it back"
        )
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200, "it lives"
        assert client.get("/server_info").json()["released_memory"] == ["kv_cache"]
        assert client.get("/release_memory_occupation").status_code == 200, "the rest, by GET"
        assert client.get("/server_info").json()["released_memory"] == ["kv_cache", "weights"]
        assert client.post("/weights_checker").status_code == 400
        assert client.post("/resume_memory_occupation", json={"tags": ["kv_cache"]}).json() is None
        assert client.post("/resume_memory_occupation").json() is None
        words = client.post("/generate", json={"text": QUESTION}).json()["error"]["message"]
        assert words.startswith("the weights are not complete, ")
        assert not running.done()
        demo = client.get("/model_info").json()["model_path"]
        client.post("/update_weights_from_disk", json={"model_path": demo}).raise_for_status()
        assert running.result(20)["meta_info"]["num_retractions"] == 1
    assert ask(client)["text"] == texts["demo"]


def test_released_weights_are_not_updated_before_they_are_resumed(client, demo):
    client.post("/release_memory_occupation", json={"tags": ["weights"]}).raise_for_status()
    response = client.post("/update_weights_from_disk", json={"model_path": demo})
    assert response.status_code == 400
    assert "POST /resume_memory_occupation first" in response.json()["message"]


@pytest.mark.parametrize(
    "query,released",
    [
        ("tags=kv_cache", ["kv_cache"]),
        ("tags=kv_cache&tags=cuda_graph", ["kv_cache"]),
        ("tags=weights,kv_cache", ["kv_cache", "weights"]),
        ("tags=cuda_graph", []),
    ],
)
def test_memory_is_named_in_the_query(client, query, released):
    client.get(f"/release_memory_occupation?{query}").raise_for_status()
    assert client.get("/server_info").json()["released_memory"] == released
    client.get(f"/resume_memory_occupation?{query}").raise_for_status()
    assert client.get("/server_info").json()["released_memory"] == []


def test_unknown_memory_in_the_query_is_refused(client):
    response = client.get("/release_memory_occupation?tags=kv")
    assert response.status_code == 400 and response.json()["error"]["param"] == "tags"


@pytest.mark.parametrize("tags", ["kv_cache", ["all"], [5]])
def test_unknown_memory_is_refused(client, tags):
    response = client.post("/release_memory_occupation", json={"tags": tags})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tags"
    assert client.post("/release_memory_occupation", json={"tags": ["cuda_graph"]}).json() is None
    assert client.get("/server_info").json()["released_memory"] == []


# Whole flows.


def test_areal(client, other):
    """What runs is aborted, and goes on with the tokens it has under the new weights."""
    assert client.get("/health").status_code == 200
    prompt = ask(client, return_prompt_token_ids=True)["prompt_token_ids"]
    params = ENDLESS | {"stop_token_ids": [1], "max_new_tokens": 2000}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        rollout = pool.submit(generate, client, **body)
        wait_for(lambda: state(client)["num_used_tokens"] > 30, 10)
        client.post("/pause_generation").raise_for_status()
        part = rollout.result(10)
    assert part["meta_info"]["finish_reason"]["type"] == "abort"
    got = [token for _, token, _ in part["meta_info"]["output_token_logprobs"]]
    assert got == part["output_ids"] and len(got) > 20
    update(client, model_path=other, abort_all_requests=True, weight_version="1")
    client.post("/continue_generation").raise_for_status()
    left = params | {"max_new_tokens": 10}
    rest = generate(client, **body | {"input_ids": prompt + got, "sampling_params": left})
    assert rest["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert rest["meta_info"]["weight_version"] == "1"
    assert rest["meta_info"]["prompt_tokens"] == len(prompt) + len(got)


def test_slime(client, other, texts):
    assert client.get("/health_generate").status_code == 200
    wait_for(lambda: client.get("/flush_cache").status_code == 200, 5)
    params = GREEDY | {"no_stop_trim": True, "skip_special_tokens": False, "max_new_tokens": 8}
    params |= {"spaces_between_special_tokens": False}
    answer = generate(client, text=QUESTION, sampling_params=params, return_logprob=True)
    triples = answer["meta_info"]["output_token_logprobs"]
    assert [triple[1] for triple in triples] == answer["output_ids"]
    assert all(triple[0] <= 0 for triple in triples)
    client.post("/pause_generation", json={}).raise_for_status()
    wait_for(lambda: client.get("/flush_cache").status_code == 200, 5)
    client.post("/release_memory_occupation", json={}).raise_for_status()
    client.post("/resume_memory_occupation", json={"tags": ["weights"]}).raise_for_status()
    client.post("/begin_weight_update", json={}).raise_for_status()
    for bucket in buckets(tensors_of(other), 5):
        response = send(client, bucket, flush_cache=False, weight_version="2")
        assert response.json()["success"] is True
    client.post("/end_weight_update", json={}).raise_for_status()
    client.post("/resume_memory_occupation", json={"tags": ["kv_cache"]}).raise_for_status()
    assert len(checksum(client)) == 64
    client.post("/continue_generation", json={}).raise_for_status()
    answer = ask(client)
    assert answer["text"] == texts["other"]
    assert answer["meta_info"]["weight_version"] == "2" and not answer["meta_info"]["cached_tokens"]


def test_weights_sent_in_part_are_not_served(client, other, texts):
    client.post("/release_memory_occupation", json={"tags": ["weights"]}).raise_for_status()
    client.post("/resume_memory_occupation", json={"tags": ["weights"]}).raise_for_status()
    *most, last = buckets(tensors_of(other), 3)
    for bucket in most:
        send(client, bucket).raise_for_status()
        response = client.post("/generate", json={"text": QUESTION})
        assert response.status_code == 503
    assert f"not complete, {len(last)} tensors" in response.json()["error"]["message"]
    send(client, last).raise_for_status()
    assert ask(client)["text"] == texts["other"]


def test_verl(client, other, texts):
    assert client.get("/health_generate").status_code == 200
    assert client.get("/flush_cache").status_code == 200
    body = {"tags": ["kv_cache", "weights"]}
    client.post("/release_memory_occupation", json=body).raise_for_status()
    client.post("/resume_memory_occupation", json={"tags": ["weights"]}).raise_for_status()
    assert send(client, tensors_of(other)).json()["success"] is True
    client.post("/resume_memory_occupation", json={"tags": ["kv_cache"]}).raise_for_status()
    assert client.get("/flush_cache").status_code == 200
    assert ask(client)["text"] == texts["other"]

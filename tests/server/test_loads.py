"""/v1/loads and /get_load, of an idle server and of a busy one."""

import concurrent.futures
import datetime

import httpx
import pytest

from tests.server.serving import GREEDY, wait_for

LONG = GREEDY | {"max_new_tokens": 3000, "ignore_eos": True}
IDLE = {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}


def loads(client) -> dict:
    response = client.get("/v1/loads?include=core,queues&dp_rank=0")
    assert response.status_code == 200
    answer = response.json()
    (load,) = answer["loads"]
    assert datetime.datetime.fromisoformat(answer["timestamp"]).tzinfo is not None
    assert answer["num_accelerators"] == 1 and answer["version"]
    return load


def test_idle(client):
    wait_for(lambda: client.get("/get_load").json() == [IDLE], 20)
    load = loads(client)
    print(load)
    assert load["num_running_reqs"] == load["num_waiting_reqs"] == load["num_total_tokens"] == 0
    assert load["max_running_requests"] == 4 and load["utilization"] == 0


def test_busy(server, client):
    """Six requests, of which four have room."""
    body = {"text": ["What is the capital of France?"] * 6, "sampling_params": LONG}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=60)
        try:
            wait_for(lambda: loads(client)["num_running_reqs"] == 4, 20)
            load, (old,) = loads(client), client.get("/get_load").json()
            print(load, old)
            assert load["num_waiting_reqs"] == 2 and load["utilization"] == 1
            assert load["num_total_tokens"] >= load["num_used_tokens"] + 2 * 7 > 2 * 7
            assert 0 < load["token_usage"] <= 1
            assert (old["num_reqs"], old["num_waiting_reqs"]) == (6, 2) and old["num_tokens"] > 0
        finally:
            client.post("/abort_request", json={"abort_all": True}).raise_for_status()
        assert call.result().status_code == 200


@pytest.mark.parametrize("query", ["dp_rank=1", "format=prometheus"])
def test_what_is_not_there_is_refused_in_words(client, query):
    response = client.get(f"/v1/loads?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]

"""/abort_request: one request, a batch, everybody; nobody else."""

import concurrent.futures

import httpx
import pytest

from tests.server.serving import GREEDY, wait_for

LONG = GREEDY | {"max_new_tokens": 3000, "ignore_eos": True}
TEXT = "What is the capital of France?"


def running(client) -> int:
    return client.get("/server_info").json()["internal_states"][0]["num_running_reqs"]


@pytest.fixture
def submit(server, client):
    """Sends a body in a thread; waits until it runs."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:

        def submit(count: int = 1, **body) -> concurrent.futures.Future:
            before = running(client)
            body |= {"sampling_params": LONG}
            url = f"{server.url}/generate"
            future = pool.submit(lambda: httpx.post(url, json=body, timeout=60))
            wait_for(lambda: running(client) == before + count, 20)
            return future

        yield submit
        client.post("/abort_request", json={"abort_all": True}).raise_for_status()


def abort(client, **body) -> None:
    response = client.post("/abort_request", json=body)
    assert (response.status_code, response.content) == (200, b"")


def finish(future: concurrent.futures.Future) -> list[tuple]:
    response = future.result(20)
    assert response.status_code == 200
    answers = response.json() if isinstance(response.json(), list) else [response.json()]
    return [(a["meta_info"]["finish_reason"]["type"], len(a["output_ids"])) for a in answers]


def test_only_the_request_of_that_id_ends_with_what_it_has(client, submit):
    first, second = submit(text=TEXT, rid="a"), submit(text=TEXT, rid="ab")
    abort(client, rid="")
    abort(client, rid="b")
    abort(client, rid="a")
    ((reason, count),) = finish(first)
    print(f"{reason} after {count} tokens")
    assert reason == "abort" and 0 < count < 3000
    assert not second.done() and running(client) == 1
    abort(client, rid="ab")
    assert finish(second)[0][0] == "abort"


def test_a_batch_ends_by_its_own_id_and_a_member_by_its(client, submit):
    batch = submit(3, text=[TEXT] * 3, rid="batch")
    abort(client, rid="batch_1")
    wait_for(lambda: running(client) == 2, 20)
    abort(client, rid="batch")
    assert [reason for reason, _ in finish(batch)] == ["abort"] * 3


def test_abort_all(client, submit):
    calls = [submit(text=TEXT), submit(text=TEXT)]
    abort(client, abort_all=True)
    assert [finish(call)[0][0] for call in calls] == ["abort", "abort"]
    abort(client, rid="a")  # gone: no error


@pytest.mark.parametrize("body, param", [({"rid": 5}, "rid"), ({"abort_all": "x"}, "abort_all")])
def test_bad_bodies_are_refused_in_words(client, body, param):
    response = client.post("/abort_request", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_another_site_may_not(client):
    headers = {"origin": "http://elsewhere.example"}
    assert client.post("/abort_request", json={}, headers=headers).status_code == 403

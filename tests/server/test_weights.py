"""Other weights over HTTP: what answers, what follows, and what trainers do around it."""

import concurrent.futures
import signal
import time

import httpx
import pytest

from tests.engine.reloading import QUESTION, write_variant
from tests.server.serving import (
    DEMO_MODEL,
    GREEDY,
    generate,
    num_running,
    open_stream,
    wait_for,
)

PARIS = " The capital of France is Paris."
ENDLESS = GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def other(folder) -> str:
    return str(write_variant(folder / "other"))


@pytest.fixture(scope="module")
def demo(folder) -> str:
    return str(write_variant(folder / "demo", seed=None))


@pytest.fixture(scope="module")
def server(start, folder):
    with start(weights_root=folder) as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def begin_with_the_demo_model(client, demo):
    client.post("/continue_generation")
    update(client, model_path=demo, weight_version="demo", abort_all_requests=True)


def update(client: httpx.Client, path: str = "/update_weights_from_disk", **body) -> str:
    """Its message; the status must be 200."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["success", "message", "num_paused_requests"] and answer["success"]
    return answer["message"]


def refused(client: httpx.Client, status: int = 400, **body) -> str:
    response = client.post("/update_weights_from_disk", json=body)
    answer = response.json()
    print(response.status_code, answer)
    assert response.status_code == status
    assert answer["success"] is False and answer["num_paused_requests"] == 0
    return answer["message"]


def ask(client: httpx.Client, **body) -> dict:
    return generate(client, text=QUESTION, sampling_params=GREEDY, **body)


def test_everything_that_names_the_model_follows(client, other, demo):
    before = ask(client)
    assert before["text"] == PARIS and before["meta_info"]["weight_version"] == "demo"
    assert update(client, model_path=other, weight_version="7").endswith("updated to 7.")
    after = ask(client)
    assert after["text"] != PARIS and after["meta_info"]["cached_tokens"] == 0
    assert after["meta_info"]["weight_version"] == "7"
    (span,) = after["meta_info"]["weight_versions"]
    assert span == {"version": "7", "start": 0, "end": len(after["output_ids"])}
    for path in ("/get_model_info", "/model_info", "/server_info"):
        info = client.get(path).json()
        assert info["model_path"] == other and info["tokenizer_path"] == DEMO_MODEL
    info = client.get("/model_info").json()
    assert (info["served_model_name"], info["weight_version"]) == (other, "7")
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == model["root"] == other
    assert client.get(f"/v1/models/{other}").status_code == 200
    assert client.get(f"/v1/models/{demo}").status_code == 404


def test_alias_of_the_documentation_page(client, other):
    assert update(client, "/update_weights", model_path=other)
    assert ask(client)["text"] != PARIS


def test_failed_update_changes_nothing(client, other, folder):
    update(client, model_path=other, weight_version="7")
    with open_stream(client, text=QUESTION, sampling_params=ENDLESS) as answers:
        before = client.get("/model_info").json()
        words = refused(client, model_path=f"{folder}/none", weight_version="8")
        assert words == f"Failed to get weights iterator: {folder}/none (repository not found)."
        words = refused(client, model_path=DEMO_MODEL, weight_version="8")
        assert words.endswith(f"{DEMO_MODEL} is not below --weights-root.")
        (folder / "empty").mkdir()
        words = refused(client, model_path=f"{folder}/empty")
        assert words == (
            f"Failed to get weights iterator: Cannot find any model weights with `{folder}/empty`."
        )
        words = refused(client, model_path=other, load_format="pt")
        assert words.startswith("Failed to get model loader: 'pt' is not read here")
        assert client.get("/model_info").json() == before
        assert next(answers)["meta_info"]["finish_reason"] is None, "it still runs"
    assert ask(client)["meta_info"]["weight_version"] == "7"


@pytest.mark.parametrize(
    "body,param",
    [
        ({}, "model_path"),
        ({"model_path": ""}, "model_path"),
        ({"model_path": 3}, "model_path"),
        ({"model_path": "x", "weight_version": 7}, "weight_version"),
        ({"model_path": "x", "weight_version": "v" * 300}, "weight_version"),
        ({"model_path": "x", "flush_cache": "yes"}, "flush_cache"),
        ({"model_path": "x", "abort_all_requests": 1}, "abort_all_requests"),
        ({"model_path": "x", "token_step": 1.5}, "token_step"),
        ({"model_path": "x", "manifest": {}}, "manifest"),
        ({"model_path": "x", "in_flight": "now"}, "in_flight"),
    ],
)
def test_bad_field_is_named(client, body, param):
    response = client.post("/update_weights_from_disk", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_every_field_that_sglang_has_is_taken(client, other):
    message = update(
        client,
        model_path=other,
        load_format="safetensors",
        abort_all_requests=False,
        weight_version="9",
        is_async=False,
        torch_empty_cache=True,
        keep_pause=False,
        recapture_cuda_graph=False,
        token_step=3,
        flush_cache=True,
        manifest=None,
    )
    assert message == "Succeeded to update model weights. Weight version updated to 9."
    assert update(client, model_path=other, load_format=None, weight_version=None)


def test_second_update_at_once_is_a_conflict(client, other, demo):
    """The first one waits for a request that does not end."""
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        open_stream(client, text=QUESTION, sampling_params=ENDLESS) as answers,
    ):
        first = pool.submit(update, client, model_path=other)
        wait_for(lambda: state(client)["is_updating"], 5)
        assert refused(client, 409, model_path=demo) == (
            "Another update of the weights is under way."
        )
        next(answers)
    first.result(10)
    assert ask(client)["text"] != PARIS


def state(client: httpx.Client) -> dict:
    return client.get("/server_info").json()["internal_states"][0]


def test_client_that_leaves_its_update_gets_it_all_the_same(server, client, other):
    with open_stream(client, text=QUESTION, sampling_params=ENDLESS):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/update_weights_from_disk", json={"model_path": other}, timeout=0.5)
        assert state(client)["is_updating"]
        assert client.get("/model_info").json()["model_path"] != other
    wait_for(lambda: client.get("/model_info").json()["model_path"] == other, 5)
    assert ask(client)["text"] != PARIS


@pytest.mark.parametrize("bodies", [(None, None), ("{}", "{}"), ('{"mode": "retract"}', "null")])
def test_pause_and_continue_with_and_without_a_body(client, bodies):
    response = client.post("/pause_generation", content=bodies[0])
    assert response.json() == {"message": "Generation paused successfully.", "status": "ok"}
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200, "it lives"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client)
        wait_for(lambda: num_running(client), 5)
        time.sleep(0.2)
        assert not answer.done()
        response = client.post("/continue_generation", content=bodies[1])
        assert response.json() == {"message": "Generation continued successfully.", "status": "ok"}
        assert answer.result(10)["text"] == PARIS
    assert client.get("/ready").status_code == 200


@pytest.mark.parametrize("body", ['{"mode": "later"}', '{"mode": 3}', "[]", "{"])
def test_bad_pause_is_refused(client, body):
    assert client.post("/pause_generation", content=body).status_code == 400
    assert client.get("/ready").status_code == 200


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


def test_update_is_refused_while_the_server_ends(server, client, other):
    """The last test: it ends the server."""
    with open_stream(client, text=QUESTION, sampling_params=ENDLESS) as answers:
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/ready").status_code == 503, 5)
        response = client.post("/update_weights_from_disk", json={"model_path": other})
        assert response.status_code == 503
        next(answers)

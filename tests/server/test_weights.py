"""Other weights over HTTP: what answers, and what follows."""

import concurrent.futures
import time

import httpx
import pytest

from jaxserve.server import weights
from tests.engine.reloading import QUESTION
from tests.server.serving import DEMO_MODEL, num_running, open_stream, wait_for
from tests.server.trainee import ENDLESS, PARIS, ask, state, update

ROUTES = weights.blueprint._future_routes
pytestmark = pytest.mark.usefixtures("demo_weights")


@pytest.fixture(scope="module")
def client(weights_client):
    return weights_client


def refused(client: httpx.Client, status: int = 400, **body) -> str:
    response = client.post("/update_weights_from_disk", json=body)
    answer = response.json()
    print(response.status_code, answer)
    assert response.status_code == status
    assert answer["success"] is False and answer["num_paused_requests"] == 0
    return answer["message"]


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


def test_failed_update_changes_nothing(client, other, weights_folder):
    update(client, model_path=other, weight_version="7")
    with open_stream(client, text=QUESTION, sampling_params=ENDLESS) as answers:
        before = client.get("/model_info").json()
        words = refused(client, model_path=f"{weights_folder}/none", weight_version="8")
        assert (
            words
            == f"Failed to get weights iterator: {weights_folder}/none (repository not found)."
        )
        words = refused(client, model_path=DEMO_MODEL, weight_version="8")
        assert words.endswith(f"{DEMO_MODEL} is not below --weights-root.")
        (weights_folder / "empty").mkdir()
        words = refused(client, model_path=f"{weights_folder}/empty")
        empty = f"Cannot find any model weights with `{weights_folder}/empty`"
        assert words == f"Failed to get weights iterator: {empty}."
        words = refused(client, model_path=other, load_format="orbax")
        assert words.startswith("Failed to get weights iterator: Cannot find any orbax checkpoint")
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


def test_client_that_leaves_its_update_gets_it_all_the_same(client, other):
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


@pytest.mark.parametrize("path", sorted({route.uri for route in ROUTES}))
def test_page_of_another_site_changes_nothing(client, path):
    before = client.get("/model_info").json()
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        response = client.post(f"/{path.strip('/')}", json={}, headers=headers)
        assert response.status_code == 403
        assert "is refused to pages of another origin" in response.json()["error"]["message"]
    assert client.get("/model_info").json() == before
    assert client.get("/ready").status_code == 200


@pytest.mark.parametrize("body", ['{"mode": "later"}', '{"mode": 3}', "[]", "{"])
def test_bad_pause_is_refused(client, body):
    assert client.post("/pause_generation", content=body).status_code == 400
    assert client.get("/ready").status_code == 200

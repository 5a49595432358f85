"""--api-key and --admin-api-key: who may call what."""

import types

import pytest

from jaxserve.config import ServerConfig
from jaxserve.server.app import create_app
from jaxserve.server.auth import level_of
from tests.server.serving import GREEDY

KEY, ADMIN_KEY = "sesame-1", "sesame-2"
OPEN = {"/health", "/health_generate", "/ready", "/ping", "/metrics"}
ADMIN = {
    "/abort_request",
    "/begin_weight_update",
    "/continue_generation",
    "/destroy_weights_update_group",
    "/dump_expert_distribution_record",
    "/end_weight_update",
    "/flush_cache",
    "/freeze_gc",
    "/get_weights_by_name",
    "/init_weights_update_group",
    "/pause_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/start_expert_distribution_record",
    "/stop_expert_distribution_record",
    "/update_weight_version",
    "/update_weights",
    "/update_weights_from_disk",
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/weights_checker",
}


@pytest.fixture(scope="module")
def routes() -> list:
    config = ServerConfig(model_path="model")
    app = create_app(types.SimpleNamespace(config=config), config)
    app.router.finalize()
    return app.router.routes


@pytest.fixture(scope="module")
def guarded(start):
    with start(api_key=KEY, admin_api_key=ADMIN_KEY) as server, server.client() as client:
        yield types.SimpleNamespace(server=server, client=client)


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}"}


def test_every_route_has_the_level_that_it_should(routes):
    found: dict[str, set[str]] = {"open": set(), "normal": set(), "admin": set()}
    for route in routes:
        found[level_of(route.name)].add(f"/{route.path}")
    print({level: len(paths) for level, paths in found.items()})
    assert found["open"] == OPEN and found["admin"] == ADMIN
    assert {"/generate", "/encode", "/v1/models", "/server_info", "/tokenize"} < found["normal"]


def test_without_a_key_nothing_passes_but_probes(guarded, routes):
    for route in routes:
        path, method = f"/{route.path}".replace("<name:path>", "x"), sorted(route.methods)[0]
        status = guarded.client.request(method, path, json={}).status_code
        assert (status != 401) == (path in OPEN), f"{method} {path}: {status}"
    print(f"{len(routes)} routes")


@pytest.mark.parametrize("path", ["/nothing", "//generate", "/generate/", "/health/../generate"])
def test_nobody_learns_of_routes_without_a_key(guarded, path):
    assert guarded.client.post(path, json={}).status_code == 401
    assert guarded.client.get("/generate").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(KEY, "Basic"),
        bearer("é"),
    ],
    ids=str,
)
def test_wrong_keys_are_refused_as_sglang_does(guarded, headers):
    headers = {name: value.encode() for name, value in headers.items()}
    response = guarded.client.post("/generate", json={"text": "a"}, headers=headers)
    assert response.status_code == 401 and response.json() == {"error": "Unauthorized"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_key_generates(guarded, scheme):
    body = {"text": "What is the capital of France?", "sampling_params": GREEDY}
    response = guarded.client.post("/generate", json=body, headers=bearer(KEY, scheme))
    assert response.status_code == 200 and "Paris" in response.json()["text"]


def test_each_key_opens_its_own_level(guarded):
    ask = guarded.client.post
    assert ask("/flush_cache", headers=bearer(KEY)).status_code == 401
    assert ask("/flush_cache", headers=bearer(ADMIN_KEY)).status_code == 200
    assert ask("/generate", json={"text": "a"}, headers=bearer(ADMIN_KEY)).status_code == 401
    assert guarded.client.get("/nothing", headers=bearer(KEY)).status_code == 404


def test_keys_are_shown_nowhere(guarded):
    info = guarded.client.get("/server_info", headers=bearer(KEY)).text
    assert "launch_command" in info and "--api-key ***" in info
    for key in (KEY, ADMIN_KEY):
        assert key not in info and key not in guarded.server.output
    assert "'Authorization: Bearer '$API_KEY" in guarded.server.output

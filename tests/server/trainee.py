"""The server whose weights tests change, and ways to ask it."""

import base64
import pathlib

import httpx
import numpy as np
import safetensors.numpy

from tests.engine.reloading import FILE, QUESTION
from tests.server.serving import GREEDY, generate

PARIS = " The capital of France is Paris."
ENDLESS = GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}
Q = "model.layers.0.self_attn.q_proj.weight"
MOST_BYTES = 6_000_000  # of a request's body


def state(client: httpx.Client) -> dict:
    """The engine's."""
    return client.get("/server_info").json()["internal_states"][0]


def update(client: httpx.Client, path: str = "/update_weights_from_disk", **body) -> str:
    """Its message; the status must be 200."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["success", "message", "num_paused_requests"] and answer["success"]
    return answer["message"]


def ask(client: httpx.Client, **fields) -> dict:
    return generate(client, text=QUESTION, sampling_params=GREEDY, **fields)


def tensors_of(folder: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(pathlib.Path(folder) / FILE)


def encode(tensors: dict[str, np.ndarray]) -> str:
    return base64.b64encode(safetensors.numpy.save(tensors)).decode()


def send(client: httpx.Client, tensors: dict[str, np.ndarray], **fields) -> httpx.Response:
    body = {"load_format": "safetensors", "serialized_named_tensors": [encode(tensors)]}
    return client.post("/update_weights_from_tensor", json=body | fields)


def buckets(tensors: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::count]} for i in range(count)]


def weights(client: httpx.Client, name: str, **fields) -> np.ndarray:
    response = client.post("/get_weights_by_name", json={"name": name, **fields})
    assert response.status_code == 200, response.text
    return np.array(response.json(), np.float32)


def checksum(client: httpx.Client) -> str:
    answer = client.post("/weights_checker", json={"action": "checksum"}).json()
    assert answer["success"] is True and answer["ranks"][0]["checksum"]
    return answer["per_engine_checksum"]

"""Tensors sent, and read back."""

import base64
import hashlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.server.trainee import (
    MOST_BYTES,
    Q,
    ask,
    buckets,
    checksum,
    encode,
    send,
    tensors_of,
    weights,
)

pytestmark = pytest.mark.usefixtures("demo_weights")


@pytest.fixture(scope="module")
def client(weights_client):
    return weights_client


# Reading.


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        Q,
        Q.replace("q_proj", "k_proj"),
        Q.replace("q_proj.weight", "v_proj.bias"),
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)
def test_parameter_is_read_by_its_name_in_the_checkpoint(client, demo, name):
    expected = tensors_of(demo)[name].astype(np.float32)
    np.testing.assert_array_equal(weights(client, name, truncate_size=5), expected[:5])
    np.testing.assert_array_equal(weights(client, name), expected[:100])
    response = client.request("GET", "/get_weights_by_name", json={"name": name})
    np.testing.assert_array_equal(np.array(response.json(), np.float32), expected[:100])
    response = client.get("/get_weights_by_name", params={"name": name, "truncate_size": 2})
    assert len(response.json()) == 2


@pytest.mark.parametrize(
    "body,param",
    [
        ({"name": "model.layers.0.self_attn.qkv_proj.weight"}, None),
        ({}, "name"),
        ({"name": 5}, "name"),
        ({"name": Q, "truncate_size": 0}, "truncate_size"),
        ({"name": Q, "truncate_size": "many"}, "truncate_size"),
    ],
)
def test_unknown_parameter_is_refused(client, body, param):
    response = client.post("/get_weights_by_name", json=body)
    print(response.json())
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize("digits", [19, 20, 4400])
def test_number_in_the_query_that_is_none(client, digits):
    params = {"name": Q, "truncate_size": "9" * digits}
    response = client.get("/get_weights_by_name", params=params)
    print(response.status_code, response.text[:200])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "truncate_size"


def test_checksum_is_of_names_and_values(client, demo, other):
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors_of(demo).items()):
        tensor = tensor.astype(np.float32)  # as it is served
        sha256.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + tensor.tobytes())
    assert checksum(client) == sha256.hexdigest()
    client.post("/update_weights_from_disk", json={"model_path": other}).raise_for_status()
    assert checksum(client) != sha256.hexdigest()
    assert client.get("/weights_checker").status_code == 200
    response = client.post("/weights_checker", json={"action": "snapshot"})
    assert response.status_code == 400 and response.json()["success"] is False


# Tensors.


def test_all_tensors_sent_serve(client, other, texts):
    response = send(client, tensors_of(other), weight_version="sent")
    message = "Succeeded to update model weights. Weight version updated to sent."
    assert response.json() == {"success": True, "message": message, "num_paused_requests": 0}
    answer = ask(client)
    assert answer["text"] == texts["other"] and answer["meta_info"]["weight_version"] == "sent"
    assert client.get("/model_info").json()["model_path"].endswith("/demo"), "no folder was named"


def test_some_tensors_change_and_the_others_stay(client, demo, other, texts):
    tensors, sent = tensors_of(demo), tensors_of(other)[Q]
    before = checksum(client)
    assert send(client, {Q: sent}).status_code == 200
    np.testing.assert_array_equal(weights(client, Q), sent[:100].astype(np.float32))
    for name in (Q.replace("q_proj", "k_proj"), Q.replace("layers.0", "layers.1")):
        np.testing.assert_array_equal(weights(client, name), tensors[name][:100].astype(np.float32))
    assert send(client, {Q: tensors[Q]}).status_code == 200
    assert checksum(client) == before and ask(client)["text"] == texts["demo"]


def test_tensors_in_files_below_the_root(client, weights_folder, other, texts):
    paths = []
    for i, bucket in enumerate(buckets(tensors_of(other), 3)):
        paths.append(str(weights_folder / f"bucket-{i}.safetensors"))
        safetensors.numpy.save_file(bucket, paths[-1])
    body = {"load_format": "safetensors", "files": paths}
    assert client.post("/update_weights_from_tensor", json=body).status_code == 200
    assert ask(client)["text"] == texts["other"]
    response = client.post("/update_weights_from_tensor", json=body | {"files": ["/etc/passwd"]})
    assert response.status_code == 400
    assert response.json()["message"].endswith("/etc/passwd is not below --weights-root.")


def test_tensors_of_another_dtype_are_cast(client, demo, other, texts):
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors_of(other).items()}
    for bucket in buckets(tensors, 4):
        assert send(client, bucket).status_code == 200
    assert ask(client)["text"] == texts["other"]


def nan(tensor: np.ndarray) -> np.ndarray:
    wrong = tensor.copy()
    wrong[3, 4] = np.nan
    return wrong


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: {"model.layers.9.mlp.up_proj.weight": t[Q]}, "not in the model"),
        (lambda t: {Q: t[Q][:-1]}, "wrong shape"),
        (lambda t: {Q: t[Q].astype(np.int8)}, "not floating point"),
        (lambda t: {Q: nan(t[Q])}, f"{Q} holds NaN or infinity"),
        (lambda t: {Q: np.full(t[Q].shape, np.inf, ml_dtypes.bfloat16)}, "NaN or infinity"),
        (lambda t: {Q: np.full(t[Q].shape, 1e39, np.float64)}, "NaN or infinity"),
        (lambda t: {}, "there is no tensor"),
    ],
)
def test_tensor_that_does_not_fit_changes_nothing(client, demo, texts, change, words):
    before = checksum(client)
    response = send(client, change(tensors_of(demo)), weight_version="wrong")
    print(response.json())
    assert response.status_code == 400 and words in response.json()["message"]
    assert checksum(client) == before
    answer = ask(client)
    assert answer["text"] == texts["demo"] and answer["meta_info"]["weight_version"] == "demo"


@pytest.mark.parametrize(
    "body,words",
    [
        ({"serialized_named_tensors": ["gASVCg=="]}, "pickled tensors are never loaded"),
        ({"load_format": "direct", "serialized_named_tensors": []}, "pickled tensors are never"),
        ({"load_format": "flattened_bucket"}, "pickled tensors are never"),
        ({"load_format": "safetensors"}, "serialized_named_tensors or files is required"),
        ({"load_format": "safetensors", "serialized_named_tensors": [5]}, "list of strings"),
        ({"load_format": "safetensors", "serialized_named_tensors": ["%%"]}, "must be base64"),
        ({"load_format": "safetensors", "files": {"a": 1}}, "list of strings"),
        ({"load_format": "safetensors", "files": ["x"], "selector": "draft"}, "there is no draft"),
    ],
)
def test_what_is_no_safetensors_is_refused_in_words(client, body, words):
    response = client.post("/update_weights_from_tensor", json=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_damaged_payload_is_refused(client, demo):
    content = safetensors.numpy.save({Q: tensors_of(demo)[Q]})
    for wrong in (content[:-1], content + b"x", content[:5], b"\x80\x04pickle"):
        payload = base64.b64encode(wrong).decode()
        body = {"load_format": "safetensors", "serialized_named_tensors": payload}
        response = client.post("/update_weights_from_tensor", json=body)
        assert response.status_code == 400 and "payload 0" in response.json()["message"]
    twice = [encode({Q: tensors_of(demo)[Q]})] * 2
    body = {"load_format": "safetensors", "serialized_named_tensors": twice}
    response = client.post("/update_weights_from_tensor", json=body)
    assert response.status_code == 400 and "given twice" in response.json()["message"]


def test_payload_beyond_the_limit_is_413(client):
    body = {"load_format": "safetensors", "serialized_named_tensors": ["A" * MOST_BYTES]}
    assert client.post("/update_weights_from_tensor", json=body).status_code == 413
    assert client.get("/health").status_code == 200

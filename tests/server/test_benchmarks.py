"""The benchmarks of reloads and starts, with a tiny model on a CPU."""

import argparse
import json
import pathlib

import jax
import machine
import numpy as np
import pytest
import random_checkpoint
import reload
import start

from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.models.weights import load_params
from tests.server.serving import free_port, programs_folder

TINY = random_checkpoint.LLAMA | random_checkpoint.MODELS["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_checkpoint, "SHARD_BYTES", 100_000)
        random_checkpoint.write_checkpoint(path, TINY)
    return path


def test_checkpoint_that_it_writes_is_sound(folder):
    config = ModelConfig.from_pretrained(folder)
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.files) > 2
    for leaf in jax.tree.leaves(load_params(checkpoint, create_model(config)[1])):
        values = np.asarray(leaf, np.float32)
        assert np.isfinite(values).all() and 0 < np.abs(values).mean() < 0.1
    checkpoint.close()


def test_large_model_has_its_published_size():
    config = random_checkpoint.LLAMA | random_checkpoint.MODELS["llama-3.1-8b"]
    count = sum(int(np.prod(shape)) for _, shape in random_checkpoint.tensors(config))
    assert count == 8_030_261_248
    parameters = create_model(ModelConfig.from_dict(config))[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == count


def test_figures_of_a_running_server(weights_client, demo, demo_weights):
    found = reload.measure(weights_client, pathlib.Path(demo), 3)
    print(json.dumps(found, indent=2))
    assert found["way"] == "aside" and len(found["reloads"]) == 3
    for update in found["reloads"]:
        assert 0 < update["pause_ms"] < update["seconds"] * 1e3
        assert 0 < update["load_seconds"] < update["seconds"]
        assert update["longest_gap_ms"] > 0 and found["typical_gap_ms"] > 0
    assert found["before"]["compiled_after_ready"] == found["after"]["compiled_after_ready"]


def test_figures_of_a_start(folder, pytestconfig):
    flags = "--max-running-requests 1 --chunked-prefill-size 16 --context-length 64"
    options = argparse.Namespace(
        folder=folder,
        cache=programs_folder(pytestconfig),
        port=free_port(),
        server_args=[*flags.split(), "--max-total-tokens", "64"],
    )
    found = start.start(options)
    print(json.dumps(found, indent=2))
    assert found["engine_seconds"] < found["ready_seconds"] < found["first_answer_seconds"]
    assert {"device", "weights", "compile"} == found["parts"].keys()
    assert max(found["parts"].values()) < found["engine_seconds"]
    assert found["programs"] > 0


def test_what_the_machine_allows(folder, monkeypatch):
    monkeypatch.setattr(machine, "BLOCK_BYTES", 1 << 20)
    rates = machine.page_cache_and_disk([folder / "model-00001-of-00003.safetensors"])
    assert rates["disk"] > 0 and rates["page_cache"] > 0
    assert all(rate > 0 for rate in machine.bus().values())
    alone = start.read_and_transfer(folder)
    assert alone["bytes"] > 100_000 and alone["read"] > 0 and alone["transfer"] > 0

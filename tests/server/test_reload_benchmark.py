"""benchmarks/reload.py, with a tiny model on a CPU."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.models.weights import load_params

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "reload.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reload_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_checkpoint_that_it_writes_is_sound(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SHARD_BYTES", 100_000)
    script.write_checkpoint(tmp_path, script.LLAMA | script.MODELS["tiny"])
    config = ModelConfig.from_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) > 2
    for leaf in jax.tree.leaves(load_params(checkpoint, create_model(config)[1])):
        values = np.asarray(leaf, np.float32)
        assert np.isfinite(values).all() and 0 < np.abs(values).mean() < 0.1
    checkpoint.close()


def test_large_model_has_its_published_size(script):
    config = script.LLAMA | script.MODELS["llama-3.1-8b"]
    count = sum(int(np.prod(shape)) for _, shape in script.tensors(config))
    assert count == 8_030_261_248
    parameters = create_model(ModelConfig.from_dict(config))[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == count


def test_figures_of_a_running_server(script, weights_client, demo, demo_weights):
    found = script.measure(weights_client, pathlib.Path(demo), 3)
    print(json.dumps(found, indent=2))
    assert found["way"] == "aside" and len(found["reloads"]) == 3
    for reload in found["reloads"]:
        assert 0 < reload["pause_ms"] < reload["seconds"] * 1e3
        assert 0 < reload["load_seconds"] < reload["seconds"]
        assert reload["longest_gap_ms"] > 0 and found["typical_gap_ms"] > 0
    assert found["before"]["compiled_after_ready"] == found["after"]["compiled_after_ready"]


def test_what_the_machine_allows(script, demo, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_BYTES", 1 << 20)
    rates = script.page_cache_and_disk([pathlib.Path(demo) / "model.safetensors"])
    assert rates["disk"] > 0 and rates["page_cache"] > 0
    assert all(rate > 0 for rate in script.bus().values())

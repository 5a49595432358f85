"""The benchmark of embeddings, with a tiny model on a CPU."""

import json

import embed
import jax
import pytest

from jaxserve.models.config import ModelConfig
from tests.server.serving import programs_folder


def test_it_measures(capsys, pytestconfig):
    sizes = ["--texts", "9", "--length", "20", "--chunk", "60", "--rows", "4", "--rounds", "2"]
    cache = ["--compilation-cache-dir", programs_folder(pytestconfig)]
    embed.main(["--model", "tiny", "--dtype", "float32", "--peak-tflops", "0.001", *sizes, *cache])
    found = json.loads(capsys.readouterr().out)
    print(found)
    assert len(found["seconds"]) == 2 and found["embeddings_per_s"] > 0
    assert found["share_of_peak"] == pytest.approx(found["tflops_per_s"] / 0.001, rel=0.5)
    jax.clear_caches()


def test_operations_are_two_per_parameter_and_token_and_attention():
    config = ModelConfig.from_dict(embed.QWEN2 | embed.MODELS["gte-qwen2-1.5b"])
    one = embed.flops_of(config, 1)
    print(f"{one:.4g} operations for a token")
    assert one == pytest.approx(2 * 1.31e9, rel=0.01), "1.54 billion parameters, 0.23 of embedding"
    more = embed.flops_of(config, 512) - 512 * one
    assert more == 4 * 28 * 1536 * (512 * 511 // 2)

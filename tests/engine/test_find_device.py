"""Where the model runs, or why it cannot."""

import jax
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine_builder import find_device


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no libtpu.so")])
def test_a_plugin_that_is_missing_is_told_in_words(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match=r"--device cuda: .* 'jaxserve\[cuda12\]'") as raised:
        find_device(EngineConfig(model_path="x", device="cuda"))
    assert str(error) in str(raised.value)


def test_another_device_than_jax_has_is_refused():
    with pytest.raises(ValueError, match="--device tpu: JAX runs on cpu here"):
        find_device(EngineConfig(model_path="x", device="tpu"))

"""Mistral (https://arxiv.org/abs/2310.06825): Llama without biases, with a window over all layers
where the config has one."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, layer_windows
from jaxserve.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        # What transformers takes where config.json is silent.
        window = raw.get("sliding_window", 4096)
        return {
            "num_kv_heads": raw.get("num_key_value_heads") or 8,
            "windows": layer_windows(raw, config.num_layers, window, first_windowed=0),
        }

"""Mistral (https://arxiv.org/abs/2310.06825): Llama without biases, with a window over all layers
where the config has one."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, layer_windows, size
from jaxserve.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        # What transformers takes where config.json is silent.
        is_windowed = raw.get("sliding_window", 4096) is not None
        window = size(raw, "sliding_window", 4096) if is_windowed else None
        return {
            "num_kv_heads": size(raw, "num_key_value_heads", 8),
            "windows": layer_windows(raw, config.num_layers, window, first_windowed=0),
        }

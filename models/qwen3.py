"""Qwen3, dense (https://arxiv.org/abs/2505.09388): Llama with a norm on each query and key head."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, size
from jaxserve.models.llama import LlamaForCausalLM
from jaxserve.models.qwen2 import qwen_windows


class Qwen3ForCausalLM(LlamaForCausalLM):
    qk_norm = "head"

    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        biases = {
            key: value
            for key, value in LlamaForCausalLM.read_config(raw, config).items()
            if key != "mlp_bias"
        }
        return biases | {
            "windows": qwen_windows(raw, config),
            # Its head_dim is 128 by default, whatever the hidden size and the number of heads.
            "head_dim": size(raw, "head_dim", 128),
        }

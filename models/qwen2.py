"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2412.15115): Llama with a bias on q, k and v."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, layer_windows
from jaxserve.models.llama import LlamaForCausalLM


def qwen_windows(raw: Mapping[str, Any], config: ModelConfig) -> tuple[int | None, ...]:
    """The first `max_window_layers` layers see everything; the window counts only when it is on."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window", False) else None
    return layer_windows(raw, config.num_layers, window, raw.get("max_window_layers", 28))


class Qwen2ForCausalLM(LlamaForCausalLM):
    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": True, "windows": qwen_windows(raw, config)}

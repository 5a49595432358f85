"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2412.15115): Llama with a bias on q, k and v."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, flag, layer_windows, size
from jaxserve.models.llama import LlamaForCausalLM


def qwen_windows(raw: Mapping[str, Any], config: ModelConfig) -> tuple[int | None, ...]:
    """The first `max_window_layers` layers see everything; the window counts only when it is on."""
    is_windowed = flag(raw, "use_sliding_window") and raw.get("sliding_window") is not None
    window = size(raw, "sliding_window", 0) if is_windowed else None
    first = raw.get("max_window_layers")
    if first is not None and not isinstance(first, int):
        raise ValueError(f"config.json: max_window_layers is {first!r}, needs an integer")
    return layer_windows(raw, config.num_layers, window, 28 if first is None else first)


class Qwen2ForCausalLM(LlamaForCausalLM):
    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": True, "windows": qwen_windows(raw, config)}

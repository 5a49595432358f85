"""Qwen1.5-MoE and Qwen2-MoE (https://arxiv.org/abs/2407.10671): Qwen2 with experts, one of them
for all tokens, behind a gate of its own."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, flag, layer_windows, size
from jaxserve.models.moe import MoeForCausalLM, read_moe, sparse_layers


class Qwen2MoeForCausalLM(MoeForCausalLM):
    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        return {
            "attention_bias": raw.get("qkv_bias") is None or flag(raw, "qkv_bias"),
            "windows": _windows(raw, config.num_layers),
            "moe": read_moe(
                raw,
                config,
                num_experts=60,
                top_k=4,
                intermediate_size=size(raw, "moe_intermediate_size", 1408),
                norm_topk_prob=flag(raw, "norm_topk_prob"),
                shared_intermediate_size=size(raw, "shared_expert_intermediate_size", 5632),
                is_sparse=sparse_layers(raw, config.num_layers),
            ),
        }


def _windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Unlike in Qwen2, where layer_types is silent every second of the *first* layers has one."""
    if not flag(raw, "use_sliding_window"):
        return (None,) * num_layers
    window = size(raw, "sliding_window", 4096)
    if raw.get("layer_types") is not None:
        return layer_windows(raw, num_layers, window, first_windowed=0)
    first_full = size(raw, "max_window_layers", 28)
    return tuple(window if i % 2 == 0 and i < first_full else None for i in range(num_layers))

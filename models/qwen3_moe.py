"""Qwen3-MoE (https://arxiv.org/abs/2505.09388): Qwen3 with experts."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, flag, size
from jaxserve.models.moe import MoeForCausalLM, read_moe, sparse_layers


class Qwen3MoeForCausalLM(MoeForCausalLM):
    qk_norm = "head"

    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        bias = flag(raw, "attention_bias")
        is_windowed = flag(raw, "use_sliding_window")
        window = size(raw, "sliding_window", 4096) if is_windowed else None
        return {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "windows": (window,) * config.num_layers,
            "moe": read_moe(
                raw,
                config,
                num_experts=128,
                top_k=8,
                intermediate_size=size(raw, "moe_intermediate_size", 768),
                norm_topk_prob=flag(raw, "norm_topk_prob"),
                is_sparse=sparse_layers(raw, config.num_layers),
            ),
        }

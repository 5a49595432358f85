"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral with experts in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, layer_windows, number, size
from jaxserve.models.moe import MoeDecoderLayer, MoeForCausalLM, read_moe


class MixtralDecoderLayer(MoeDecoderLayer):
    mlp_name = "block_sparse_moe"
    expert_names = ("w1", "w3", "w2")


class MixtralForCausalLM(MoeForCausalLM):
    layer_class = MixtralDecoderLayer

    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        is_windowed = raw.get("sliding_window") is not None
        window = size(raw, "sliding_window", 0) if is_windowed else None
        has_theta = "rope_theta" in raw or "rope_theta" in (raw.get("rope_parameters") or {})
        rope = config.rope if has_theta else dataclasses.replace(config.rope, theta=1e6)
        return {
            "num_kv_heads": size(raw, "num_key_value_heads", 8),
            "rms_norm_eps": number(raw, "rms_norm_eps", 1e-5),
            "rope": rope,
            "windows": layer_windows(raw, config.num_layers, window, first_windowed=0),
            "moe": read_moe(
                raw,
                config,
                num_experts=8,
                top_k=2,
                intermediate_size=config.intermediate_size,
                norm_topk_prob=True,
            ),
        }

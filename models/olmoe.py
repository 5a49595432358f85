"""OLMoE (https://arxiv.org/abs/2409.02060): experts in every layer, and a norm over all of a
token's query heads at once, and over all of its key heads."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, flag, number
from jaxserve.models.moe import MoeForCausalLM, read_moe


class OlmoeForCausalLM(MoeForCausalLM):
    qk_norm = "projection"

    @staticmethod
    def read_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        bias = flag(raw, "attention_bias")
        return {
            "rms_norm_eps": number(raw, "rms_norm_eps", 1e-5),
            "attention_bias": bias,
            "attention_out_bias": bias,
            "clip_qkv": number(raw, "clip_qkv", None),
            "moe": read_moe(
                raw,
                config,
                num_experts=64,
                top_k=8,
                intermediate_size=config.intermediate_size,
                norm_topk_prob=flag(raw, "norm_topk_prob"),
            ),
        }

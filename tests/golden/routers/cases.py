"""Routers of DeepSeek that are compared with transformers' alone, without a model around them."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from tests.golden.random_checkpoint import standard_normal

NUM_TOKENS, HIDDEN_SIZE, NUM_EXPERTS = 48, 16, 32
FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class RouterCase:
    name: str
    model: Literal["deepseek_v2", "deepseek_v3"]
    config: dict
    seed: int

    def random(self, name: str, *shape: int) -> np.ndarray:
        values = standard_normal(f"router {self.seed}/{name}", int(np.prod(shape)))
        return values.reshape(shape).astype(np.float32)

    def hidden(self) -> np.ndarray:
        return self.random("hidden", NUM_TOKENS, HIDDEN_SIZE)

    def weight(self) -> np.ndarray:
        return 0.4 * self.random("weight", NUM_EXPERTS, HIDDEN_SIZE)

    def correction_bias(self) -> np.ndarray:
        """So large that it changes most choices."""
        return 0.3 * self.random("bias", NUM_EXPERTS)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.npz"


V2 = {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0}
V3 = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5}
ROUTER_CASES = [
    RouterCase("v2_greedy", "deepseek_v2", V2 | {"topk_method": "greedy"}, 1),
    RouterCase("v2_groups", "deepseek_v2", V2 | {"topk_method": "group_limited_greedy"}, 2),
    RouterCase("v3", "deepseek_v3", V3 | {"norm_topk_prob": True}, 3),
    RouterCase("v3_no_norm", "deepseek_v3", V3 | {"norm_topk_prob": False}, 4),
    RouterCase("v3_one_group", "deepseek_v3", V3 | {"n_group": 1, "topk_group": 1}, 5),
]

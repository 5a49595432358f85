"""The shape of a mixture of experts, without jax: a part of `ModelConfig`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a router's scores become a token's choices.

    With several groups of experts (https://arxiv.org/abs/2405.04434) a token takes experts of its
    best `top_groups` groups alone; a group is worth the sum of its best `group_top` scores.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False  # weights sum to one
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 1
    scale: float = 1.0  # of the weights, after all else


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    num_experts: int
    intermediate_size: int  # of each
    routing: Routing
    is_sparse: tuple[bool, ...]  # one per layer; the others have a dense MLP
    shared_intermediate_size: int = 0  # of the expert for all tokens, 0 where there is none

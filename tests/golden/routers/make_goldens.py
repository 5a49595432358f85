"""Makes the goldens of routers with transformers, as the README above says:

python -m tests.golden.routers.make_goldens
"""

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tests.golden.routers.cases import HIDDEN_SIZE, NUM_EXPERTS, ROUTER_CASES, RouterCase

ROUTERS = {
    "deepseek_v2": (transformers.DeepseekV2Config, DeepseekV2TopkRouter),
    "deepseek_v3": (transformers.DeepseekV3Config, DeepseekV3TopkRouter),
}


@torch.inference_mode()
def choose(case: RouterCase) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids, ascending, and their weights."""
    config_class, router_class = ROUTERS[case.model]
    sizes = {"hidden_size": HIDDEN_SIZE, "n_routed_experts": NUM_EXPERTS, "num_attention_heads": 1}
    router = router_class(config_class(**sizes, **case.config))
    router.weight.data = torch.from_numpy(case.weight())
    if case.model == "deepseek_v3":
        router.e_score_correction_bias.data = torch.from_numpy(case.correction_bias())
    _, weights, expert_ids = router(torch.from_numpy(case.hidden()))
    expert_ids, order = expert_ids.sort(dim=-1)
    return expert_ids.numpy().astype(np.int32), weights.gather(1, order).numpy()


for case in ROUTER_CASES:
    expert_ids, weights = choose(case)
    np.savez_compressed(case.path, expert_ids=expert_ids, weights=weights)
    print(f"{case.name:14} {case.path.stat().st_size} bytes, weights to {weights.max():.3f}")

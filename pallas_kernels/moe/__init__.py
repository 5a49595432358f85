"""A layer of experts, of which each token takes a few (https://arxiv.org/abs/1701.06538)."""

from pallas_kernels.moe.api import Plan as Plan
from pallas_kernels.moe.api import experts as experts
from pallas_kernels.moe.api import plan as plan

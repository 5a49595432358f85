"""A layer of experts (https://arxiv.org/abs/1701.06538), each a SwiGLU, of which a token takes k."""

from pallas_kernels.moe.api import Plan as Plan
from pallas_kernels.moe.api import experts as experts
from pallas_kernels.moe.api import plan as plan

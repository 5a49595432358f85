"""Attention over a paged KV cache, and of packed rows without one."""

from pallas_kernels.attention.api import KVCache as KVCache
from pallas_kernels.attention.api import Plan as Plan
from pallas_kernels.attention.api import RaggedBatch as RaggedBatch
from pallas_kernels.attention.api import empty_kv_cache as empty_kv_cache
from pallas_kernels.attention.api import kv_cache_shape as kv_cache_shape
from pallas_kernels.attention.api import paged_attention as paged_attention
from pallas_kernels.attention.api import plan as plan
from pallas_kernels.attention.api import write_kv as write_kv
from pallas_kernels.attention.packed import PackedPlan as PackedPlan
from pallas_kernels.attention.packed import packed_attention as packed_attention
from pallas_kernels.attention.packed import plan_packed as plan_packed

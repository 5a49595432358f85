"""What the device's memory is spent on, decided before anything is loaded.

A pure function of the configuration and the device's limit, never of what happens to be free, so
that the shapes, and with them the compiled programs, are the same at the next start.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig

CPU_SHARE = 0.25  # of the machine's memory, for a KV cache that nobody has asked for


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """In bytes; `num_pages` counts the trash page."""

    device_bytes: int
    weight_bytes: int
    page_bytes: int
    num_pages: int
    page_size: int
    state_bytes: int = 0  # beside the KV cache

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def max_total_tokens(self) -> int:
        return (self.num_pages - 1) * self.page_size

    @property
    def scratch_bytes(self) -> int:
        static_bytes = self.weight_bytes + self.state_bytes + self.kv_cache_bytes
        return self.device_bytes - static_bytes

    def check_programs(self, program_bytes: int) -> None:
        """Raises ValueError where what is left cannot hold a program's temporary arrays: better
        at the start than at the first long prompt."""
        if program_bytes <= self.scratch_bytes:
            return
        fitting = math.floor(100 * (1 - program_bytes / self.device_bytes)) / 100
        raise ValueError(
            f"the programs need {_gb(program_bytes)} beside weights and KV cache, but "
            f"--mem-fraction-static leaves {_gb(self.scratch_bytes)}: lower it to {fitting}"
            ", or lower --chunked-prefill-size or --max-running-requests"
        )

    def __str__(self) -> str:
        return (
            f"Memory plan. device={_gb(self.device_bytes)}, weights={_gb(self.weight_bytes)}, "
            f"KV cache={_gb(self.kv_cache_bytes)} ({self.max_total_tokens} tokens), "
            f"left for programs={_gb(self.scratch_bytes)}"
        )


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    *,
    weight_bytes: int,
    device_bytes: int,
    max_rows: int,
    is_cpu: bool,
    state_bytes: int = 0,
) -> MemoryPlan:
    """Gives the KV cache what `mem_fraction_static` leaves beside the weights and the rest of the
    state.

    On a CPU no more than every row's longest context, and no more than a quarter of the memory,
    since it is everybody's.

    Raises:
      ValueError: it cannot work; names the flag to change.
    """
    page_size = config.page_size
    page_bytes = (
        2
        * model.num_layers
        * model.num_kv_heads
        * model.head_dim
        * page_size
        * jnp.dtype(model.dtype).itemsize
    )
    static_bytes = int(device_bytes * config.mem_fraction_static) - state_bytes
    if weight_bytes >= static_bytes:
        raise ValueError(
            f"the weights need {_gb(weight_bytes)}, but --mem-fraction-static "
            f"{config.mem_fraction_static} of the device's {_gb(device_bytes)} leaves "
            f"{_gb(max(static_bytes, 0))}: raise it, or take a smaller model or --dtype"
        )
    fitting = (static_bytes - weight_bytes) // page_bytes
    if config.max_total_tokens is not None:
        num_pages = 1 + -(-config.max_total_tokens // page_size)
        if num_pages > fitting:
            raise ValueError(
                f"--max-total-tokens {config.max_total_tokens} needs "
                f"{_gb(num_pages * page_bytes)} of KV cache, but beside the weights there is "
                f"room for {_gb(fitting * page_bytes)}: lower it to at most "
                f"{max((fitting - 1) * page_size, 0)}, or raise --mem-fraction-static"
            )
    else:
        most = 1 + max_rows * pages_per_row(model.context_length, page_size)
        share = int(device_bytes * CPU_SHARE) // page_bytes
        num_pages = min(fitting, most, max(share, 2)) if is_cpu else fitting
    if num_pages < 2:
        raise ValueError(
            f"beside the weights there is no room for one page of {page_size} tokens "
            f"({_gb(page_bytes)}): raise --mem-fraction-static"
        )
    return MemoryPlan(device_bytes, weight_bytes, page_bytes, num_pages, page_size, state_bytes)


def pages_per_row(context_length: int, page_size: int) -> int:
    return -(-context_length // page_size)


def device_memory(device: jax.Device) -> int:
    """Bytes that this process may use of the device; of a CPU, the machine's memory."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"

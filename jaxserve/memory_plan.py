"""What the device's memory is spent on, decided before anything is loaded.

A pure function of the configuration and the device's limit, never of what happens to be free, so
that the shapes, and with them the compiled programs, are the same at the next start.
"""

import contextlib
import dataclasses
import math
import os

import jax
import jax.numpy as jnp

from jaxserve import host_memory
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig

CPU_SHARE = 0.25  # of the machine's memory, for a KV cache that nobody has asked for
ASIDE_SHARE = 0.2  # of the device's memory: weights below it get room for a second copy by default


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """In bytes; `num_pages` counts the trash page."""

    device_bytes: int
    weight_bytes: int
    page_bytes: int
    num_pages: int
    page_size: int
    weight_reload: str  # aside, host or in-place
    reload_bytes: int  # kept free for new weights
    state_bytes: int = 0  # beside the KV cache

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def max_total_tokens(self) -> int:
        return (self.num_pages - 1) * self.page_size

    @property
    def scratch_bytes(self) -> int:
        static_bytes = (
            self.weight_bytes + self.state_bytes + self.kv_cache_bytes + self.reload_bytes
        )
        return self.device_bytes - static_bytes

    def check_programs(self, program_bytes: int) -> None:
        """Raises ValueError where what is left cannot hold a program's temporary arrays: better
        at the start than at the first long prompt."""
        if program_bytes <= self.scratch_bytes:
            return
        fitting = math.floor(100 * (1 - program_bytes / self.device_bytes)) / 100
        raise ValueError(
            f"the programs need {format_bytes(program_bytes)} beside weights and KV cache, but "
            f"--mem-fraction-static leaves {format_bytes(self.scratch_bytes)}: lower it to "
            f"{fitting}, or lower --chunked-prefill-size or --max-running-requests"
        )

    def __str__(self) -> str:
        reload = f"new weights={format_bytes(self.reload_bytes)}, " if self.reload_bytes else ""
        return (
            f"Memory plan. device={format_bytes(self.device_bytes)}, "
            f"weights={format_bytes(self.weight_bytes)}, {reload}"
            f"KV cache={format_bytes(self.kv_cache_bytes)} ({self.max_total_tokens} tokens), "
            f"left for programs={format_bytes(self.scratch_bytes)}"
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
    """Gives the KV cache what `mem_fraction_static` leaves beside the weights, room for new ones
    where `weight_reload` is aside, and the rest of the state. "auto" is aside for small weights,
    if the rest fits beside both copies, and else host.

    On a CPU no more than every row's longest context, and no more than a quarter of the memory,
    since it is everybody's.

    Raises:
      ValueError: it cannot work; names the flag to change.
    """
    ways = [config.weight_reload]
    if ways == ["auto"]:
        ways = ["aside", "host"] if weight_bytes < ASIDE_SHARE * device_bytes else ["host"]
    sizes = (weight_bytes, device_bytes, max_rows, is_cpu, state_bytes)
    for way in ways[:-1]:
        with contextlib.suppress(ValueError):
            return _plan(config, model, way, *sizes)
    return _plan(config, model, ways[-1], *sizes)


def _plan(
    config: EngineConfig,
    model: ModelConfig,
    way: str,
    weight_bytes: int,
    device_bytes: int,
    max_rows: int,
    is_cpu: bool,
    state_bytes: int,
) -> MemoryPlan:
    page_size = page_size_of(config, model)
    page_bytes = (
        2
        * model.num_layers
        * model.num_kv_heads
        * model.head_dim
        * page_size
        * jnp.dtype(model.dtype).itemsize
    )
    static_bytes = int(device_bytes * config.mem_fraction_static) - state_bytes
    reload_bytes = weight_bytes if way == "aside" else 0
    if weight_bytes + reload_bytes >= static_bytes:
        copies = "two copies of the weights (--weight-reload aside)" if reload_bytes else "weights"
        raise ValueError(
            f"the {copies} need {format_bytes(weight_bytes + reload_bytes)}, but "
            f"--mem-fraction-static {config.mem_fraction_static} of the device's "
            f"{format_bytes(device_bytes)} leaves {format_bytes(max(static_bytes, 0))}: raise it, "
            f"or take {'--weight-reload host, ' if reload_bytes else ''}a smaller model or --dtype"
        )
    if model.encoder is not None:
        page_bytes, num_pages = 0, 1 + max_rows
        rest = way, reload_bytes, state_bytes
        return MemoryPlan(device_bytes, weight_bytes, page_bytes, num_pages, page_size, *rest)
    fitting = (static_bytes - weight_bytes - reload_bytes) // page_bytes
    if config.max_total_tokens is not None:
        num_pages = 1 + -(-config.max_total_tokens // page_size)
        if num_pages > fitting:
            raise ValueError(
                f"--max-total-tokens {config.max_total_tokens} needs "
                f"{format_bytes(num_pages * page_bytes)} of KV cache, but beside the weights "
                f"there is room for {format_bytes(fitting * page_bytes)}: lower it to at most "
                f"{max((fitting - 1) * page_size, 0)}, or raise --mem-fraction-static"
            )
    else:
        most = 1 + max_rows * pages_per_row(model.context_length, page_size)
        share = int(device_bytes * CPU_SHARE) // page_bytes
        num_pages = min(fitting, most, max(share, 2)) if is_cpu else fitting
    if num_pages < 2:
        raise ValueError(
            f"beside the weights there is no room for one page of {page_size} tokens "
            f"({format_bytes(page_bytes)}): raise --mem-fraction-static"
        )
    return MemoryPlan(
        device_bytes, weight_bytes, page_bytes, num_pages, page_size, way, reload_bytes, state_bytes
    )


def page_size_of(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens in a page. An encoder has no KV cache: of its pages, which take no memory, a row has
    one, whatever its text."""
    return config.page_size if model.encoder is None else model.context_length


def pages_per_row(context_length: int, page_size: int) -> int:
    return -(-context_length // page_size)


def device_memory(device: jax.Device) -> int:
    """Bytes that this process may use of the device; of a CPU, the machine's memory."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: jax.Device) -> int:
    """Bytes of the device that are not in use; of a CPU, the machine's."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_host_memory()


def memory_in_use(device: jax.Device) -> int | None:
    """Bytes of the device that arrays take; None where it does not tell."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_in_use"] if stats and "bytes_in_use" in stats else None


def free_host_memory() -> int:
    """Bytes; a system that does not tell has all it is asked for."""
    available = host_memory.available()
    return 2**62 if available is None else available


def format_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"

"""The engine without its transport: messages in, steps, news out. One thread calls it."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve import compilation_cache, hub
from jaxserve.buckets import Buckets
from jaxserve.config import EngineConfig
from jaxserve.memory_plan import MemoryPlan, device_memory, pages_per_row, plan_memory
from jaxserve.messages import (
    AbortRequest,
    AddRequest,
    Call,
    EngineInfo,
    Reply,
    StepOutput,
    ToEngine,
)
from jaxserve.model_loader import ModelFiles, num_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.runner import Runner
from jaxserve.scheduler import Scheduler
from jaxserve.state import StateShape
from jaxserve.step_log import StepLog
from jaxserve.stop_checker import StopChecker
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The options whose default depends on the device."""

    max_rows: int
    max_prefill_tokens: int
    bucket_growth: int

    @classmethod
    def of(cls, config: EngineConfig, is_cpu: bool) -> "Sizes":
        return cls(
            max_rows=config.max_running_requests or (16 if is_cpu else 256),
            max_prefill_tokens=config.chunked_prefill_size or (512 if is_cpu else 8192),
            # A CPU compiles slowly, and padding costs its attention nothing: fewer buckets.
            bucket_growth=4 if is_cpu else 2,
        )


class EngineCore:
    """A model, its scheduler and its runner."""

    info: EngineInfo

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic):
        """Plans the memory, loads the model and compiles every bucket.

        Raises:
          FileNotFoundError, ValueError: the model or an option cannot be served; says why.
        """
        start = clock()
        device = _device(config)
        is_cpu = device.platform == "cpu"
        compilation_cache.enable(config.compilation_cache_dir)
        files = ModelFiles.find(config)
        self.tokenizer, tokenizer_folder = _load_tokenizer(config, files.folder)
        sizes = Sizes.of(config, is_cpu)
        memory = plan_memory(
            config,
            files.config,
            weight_bytes=num_bytes(create_model(files.config)[1]),
            device_bytes=device_memory(device),
            max_rows=sizes.max_rows,
            is_cpu=is_cpu,
        )
        logger.info("%s", memory)
        graphdef, params = files.load(config.load_format, config.random_seed or 0)
        self._build(config, files.config, memory, sizes, graphdef, params, clock)
        self.info = _describe(
            config, files, memory, sizes, device, tokenizer_folder, self._eos, clock() - start
        )

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def handle(self, message: ToEngine) -> list[Reply | StepOutput]:
        """Takes in one message; an unknown or impossible one is answered, never raised."""
        if isinstance(message, AddRequest):
            return self._add(message.request)
        if isinstance(message, AbortRequest):
            update = self.scheduler.abort(message.rid)
            return [StepOutput([update])] if update else []
        return [self._call(message)]

    def step(self) -> StepOutput | None:
        """Runs one step; None where there is nothing to do."""
        schedule = self.scheduler.schedule()
        if schedule is None:
            return None
        self.log.before(schedule)
        out = self.runner.execute(self.plan_builder.build(schedule))
        sampled = {
            chunk.running.row: int(token) if is_finite else None
            for chunk in schedule.chunks
            for token, is_finite in [out[chunk.running.row]]
        }
        return StepOutput(self.scheduler.update(schedule, sampled))

    def _build(
        self,
        config: EngineConfig,
        model: ModelConfig,
        memory: MemoryPlan,
        sizes: Sizes,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        clock: Callable[[], float],
    ) -> None:
        buckets = Buckets.make(sizes.max_rows, sizes.max_prefill_tokens, sizes.bucket_growth)
        width = pages_per_row(model.context_length, config.page_size)
        shape = StateShape(
            max_rows=sizes.max_rows,
            pages_per_row=width,
            num_layers=model.num_layers,
            num_pages=memory.num_pages,
            page_size=config.page_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            hidden_size=model.hidden_size,
            dtype=jnp.dtype(model.dtype),
        )
        half = memory.kv_cache_bytes / 2e9
        logger.info(
            "KV Cache is allocated. #tokens: %d, K size: %.2f GB, V size: %.2f GB",
            memory.max_total_tokens,
            half,
            half,
        )
        began = time.perf_counter()
        self.runner = Runner(graphdef, params, shape, buckets, _report_compiled)
        logger.info("Compiled in %.1f s.", time.perf_counter() - began)
        self.scheduler = Scheduler(
            PageAllocator(memory.num_pages),
            page_size=config.page_size,
            max_rows=sizes.max_rows,
            max_prefill_tokens=sizes.max_prefill_tokens,
        )
        self.plan_builder = PlanBuilder(buckets, max_rows=sizes.max_rows, pages_per_row=width)
        self.log = StepLog(self.scheduler, config.decode_log_interval, clock)
        eos = set(model.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        self._eos = frozenset(eos)
        logger.info(
            "max_total_num_tokens=%d, chunked_prefill_size=%d, max_running_requests=%d, "
            "context_len=%d",
            memory.max_total_tokens,
            sizes.max_prefill_tokens,
            sizes.max_rows,
            model.context_length,
        )

    def _add(self, request: Request) -> list[StepOutput]:
        try:
            self.scheduler.add(request, StopChecker(request, self._eos, self.tokenizer))
        except ValueError as error:
            reason = FinishReason(
                "abort", message=str(error), status_code=400, err_type="BadRequestError"
            )
            return [StepOutput([RequestUpdate(request.rid, [], reason)])]
        return []

    def _call(self, call: Call) -> Reply:
        operations: dict[str, Callable[..., Any]] = {
            "flush_cache": self._flush_cache,
            "internal_state": self._internal_state,
        }
        operation = operations.get(call.operation)
        if operation is None:
            return Reply(call.call_id, error=f"unknown operation {call.operation!r}")
        try:
            return Reply(call.call_id, value=operation(**call.arguments))
        except Exception as error:
            logger.exception("%s failed", call.operation)
            return Reply(call.call_id, error=f"{type(error).__name__}: {error}")

    def _flush_cache(self) -> bool:
        """Nothing is cached beyond running requests yet, so idleness is all there is to check."""
        if self.has_work:
            logger.info(
                "Cache not flushed because there are pending requests. "
                "#queue-req: %d, #running-req: %d",
                len(self.scheduler.waiting),
                len(self.scheduler.running),
            )
            return False
        self.scheduler.check_integrity()
        logger.info("Cache flushed successfully!")
        return True

    def _internal_state(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "last_gen_throughput": self.log.last_gen_throughput,
            "num_running_reqs": len(scheduler.running),
            "num_queue_reqs": len(scheduler.waiting),
            "num_used_tokens": scheduler.num_cached_tokens,
            "token_usage": self.log.token_usage,
            "effective_max_running_requests_per_dp": scheduler.max_rows,
            "memory_usage": {
                "weight": round(self.info.weight_bytes / 1e9, 2),
                "kvcache": round(self.info.kv_cache_bytes / 1e9, 2),
                "token_capacity": self.info.max_total_num_tokens,
            },
        }


def _device(config: EngineConfig) -> jax.Device:
    """Raises ValueError where JAX already runs elsewhere: it chooses once in a process's life."""
    device = jax.devices()[0]
    wanted = {"auto": device.platform, "cuda": "gpu"}.get(config.device, config.device)
    if device.platform != wanted:
        raise ValueError(f"--device {config.device}: JAX runs on {device.platform} here")
    return device


def _load_tokenizer(config: EngineConfig, model_folder: str) -> tuple[Tokenizer | None, str | None]:
    if config.skip_tokenizer_init:
        return None, None
    folder = model_folder
    if config.tokenizer_path:
        folder = hub.resolve(config.tokenizer_path, download_dir=config.download_dir)
    return Tokenizer(folder), folder


def _report_compiled(done: int, total: int) -> None:
    if done % 5 == 0 or done == total:
        logger.info("Compiling programs: %d/%d", done, total)


def _describe(
    config: EngineConfig,
    files: ModelFiles,
    memory: MemoryPlan,
    sizes: Sizes,
    device: jax.Device,
    tokenizer_folder: str | None,
    eos: frozenset[int],
    seconds: float,
) -> EngineInfo:
    return EngineInfo(
        architecture=files.config.architecture,
        model_type=files.model_type,
        model_folder=files.folder,
        tokenizer_folder=tokenizer_folder,
        vocab_size=files.config.vocab_size,
        context_length=files.config.context_length,
        max_total_num_tokens=memory.max_total_tokens,
        max_running_requests=sizes.max_rows,
        chunked_prefill_size=sizes.max_prefill_tokens,
        page_size=config.page_size,
        eos_token_ids=sorted(eos),
        dtype=files.config.dtype,
        device=device.device_kind,
        num_devices=jax.device_count(),
        weight_bytes=memory.weight_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        startup_seconds=seconds,
    )

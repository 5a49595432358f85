"""From a configuration to an engine: plans the memory, loads the model, compiles every bucket."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxserve
from jaxserve import compilation_cache, hub
from jaxserve.buckets import Buckets
from jaxserve.compile_counter import CompileCounter
from jaxserve.config import EngineConfig
from jaxserve.engine_core import EngineCore
from jaxserve.expert_recorder import ExpertRecorder
from jaxserve.memory_plan import (
    MemoryPlan,
    device_memory,
    page_size_of,
    pages_per_row,
    plan_memory,
)
from jaxserve.messages import EmbeddingInfo, EncoderInfo, EngineInfo, ExpertInfo
from jaxserve.model_loader import ModelFiles, num_bytes
from jaxserve.models import batch_invariant
from jaxserve.models.config import ModelConfig
from jaxserve.models.pooling import PoolingConfig
from jaxserve.models.registry import create_model
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.plan_log import VERSION, Header
from jaxserve.plan_recorder import PlanRecorder, create_file
from jaxserve.radix_cache import RadixCache
from jaxserve.runner_builder import build_runner, load_weights
from jaxserve.scheduler import Scheduler
from jaxserve.served_weights import ServedWeights
from jaxserve.serving_state import ServingState
from jaxserve.state import StateShape
from jaxserve.step_log import StepLog
from jaxserve.stopwatch import Stopwatch
from jaxserve.tokenizer import Tokenizer
from jaxserve.tokenizer_identity import TokenizerIdentity
from jaxserve.weight_folder import Served
from jaxserve.weight_loader import WeightLoader
from jaxserve.weights_root import WeightsRoot, root_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The options whose default depends on the device."""

    max_rows: int
    max_prefill_tokens: int
    bucket_growth: int

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, is_cpu: bool) -> "Sizes":
        # An encoder's text is computed in one step.
        longest_whole = 0 if model.encoder is None else model.context_length
        max_prefill_tokens = min(
            config.chunked_prefill_size or (512 if is_cpu else 8192), config.max_prefill_tokens
        )
        return cls(
            max_rows=config.max_running_requests or (16 if is_cpu else 256),
            max_prefill_tokens=max(max_prefill_tokens, longest_whole),
            # A CPU compiles slowly, and padding costs its attention nothing: fewer buckets.
            bucket_growth=4 if is_cpu else 2,
        )


def build_engine(
    config: EngineConfig,
    clock: Callable[[], float] = time.monotonic,
    *,
    params: Any = None,
) -> EngineCore:
    """Everything that must be done before the first request.

    Args:
      params: weights in place of the checkpoint's: any tree with its names.

    Raises:
      FileNotFoundError, ValueError: the model or an option cannot be served; says why.
    """
    counter = CompileCounter()  # before anything is compiled
    try:
        core = _build(config, clock, counter, params)
    except BaseException:
        counter.close()
        raise
    counter.mark_ready()
    return core


def _build(
    config: EngineConfig, clock: Callable[[], float], counter: CompileCounter, params: Any
) -> EngineCore:
    if config.weights_root is not None and not os.path.isdir(config.weights_root):
        raise ValueError(f"--weights-root {config.weights_root} is no folder")
    stopwatch = Stopwatch(clock)
    with stopwatch.part("device"):
        device = find_device(config)
    is_cpu = device.platform == "cpu"
    compilation_cache.enable(config.compilation_cache_dir)
    files = ModelFiles.find(config)
    _check_recorder_mode(config, files.config)
    log_file = create_file(config.record_plans) if config.record_plans else None
    tokenizer, tokenizer_folder = _load_tokenizer(config, files.folder)
    sizes = Sizes.of(config, files.config, is_cpu)
    buckets = Buckets.make(
        sizes.max_rows,
        sizes.max_prefill_tokens,
        sizes.bucket_growth,
        config.num_continuous_decode_steps,
    )
    model = create_model(files.config)
    abstract = model[1]
    memory = plan_memory(
        config,
        files.config,
        weight_bytes=num_bytes(abstract),
        device_bytes=device_memory(device),
        max_rows=sizes.max_rows,
        is_cpu=is_cpu,
        state_bytes=_state_shape(config, files, sizes, buckets, num_pages=2).num_bytes,
    )
    logger.info("%s", memory)
    shape = _state_shape(config, files, sizes, buckets, memory.num_pages)
    runner = build_runner(
        model,
        functools.partial(load_weights, config, files, abstract, memory, params, stopwatch),
        shape,
        buckets,
        stopwatch,
        check_programs=lambda num_bytes: None if is_cpu else memory.check_programs(num_bytes),
        pooling=files.config.pooling,
        deterministic=config.deterministic,
    )
    if files.config.encoder is None:
        _log_kv_cache(memory)
    scheduler = _make_scheduler(config, files, sizes, memory)
    logger.info(
        "max_total_num_tokens=%d, chunked_prefill_size=%d, max_running_requests=%d, context_len=%d",
        memory.max_total_tokens,
        sizes.max_prefill_tokens,
        sizes.max_rows,
        files.config.context_length,
    )
    info = _engine_info(
        config, files, sizes, memory, device, tokenizer, tokenizer_folder, stopwatch
    )
    plan_builder = PlanBuilder(buckets, max_rows=sizes.max_rows, pages_per_row=shape.pages_per_row)
    recorder = None
    if log_file is not None:
        header = _log_header(config, files, device, shape, buckets)
        recorder = PlanRecorder(log_file, header)
    log = StepLog(scheduler, config.decode_log_interval, clock)
    return EngineCore(
        info,
        scheduler,
        plan_builder,
        runner,
        tokenizer,
        log,
        _weight_loader(config, files, abstract, memory, tokenizer_folder, device),
        ServedWeights(abstract, runner),
        ServingState.of(config),
        counter,
        recorder,
        _expert_recorder(config, info),
    )


def _check_recorder_mode(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ValueError for a mode of a model without experts."""
    mode = config.expert_distribution_recorder_mode
    if mode is not None and _expert_info(model) is None:
        raise ValueError(
            f"--expert-distribution-recorder-mode {mode}: {model.architecture} has no experts"
        )


def _expert_recorder(config: EngineConfig, info: EngineInfo) -> ExpertRecorder | None:
    if info.experts is None:
        return None
    most_passes = config.expert_distribution_recorder_buffer_size
    return ExpertRecorder(
        info.experts,
        config.expert_distribution_recorder_mode,
        None if most_passes < 0 else most_passes,
        config.expert_distribution_recorder_dir,
    )


def _make_scheduler(
    config: EngineConfig, files: ModelFiles, sizes: Sizes, memory: MemoryPlan
) -> Scheduler:
    allocator = PageAllocator(memory.num_pages)
    return Scheduler(
        allocator,
        RadixCache(memory.page_size, allocator) if _may_cache(config, files) else None,
        page_size=memory.page_size,
        max_rows=sizes.max_rows,
        max_prefill_tokens=sizes.max_prefill_tokens,
        may_chunk=files.config.encoder is None,
        num_decode_steps=config.num_continuous_decode_steps,
        policy=config.schedule_policy,
        max_waiting=config.max_queued_requests,
        conservativeness=config.schedule_conservativeness,
    )


def _engine_info(
    config: EngineConfig,
    files: ModelFiles,
    sizes: Sizes,
    memory: MemoryPlan,
    device: jax.Device,
    tokenizer: Tokenizer | None,
    tokenizer_folder: str | None,
    stopwatch: Stopwatch,
) -> EngineInfo:
    eos = {*files.config.eos_token_ids, tokenizer and tokenizer.eos_token_id} - {None}
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
        page_size=memory.page_size,
        eos_token_ids=sorted(eos),
        dtype=files.config.dtype,
        device=device.device_kind,
        num_devices=jax.device_count(),
        weight_bytes=memory.weight_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        startup_seconds=stopwatch.total,
        startup_phases=stopwatch.seconds,
        embedding=_embedding_info(files.config.pooling),
        encoder=_encoder_info(files.config),
        experts=_expert_info(files.config),
    )


def _state_shape(
    config: EngineConfig, files: ModelFiles, sizes: Sizes, buckets: Buckets, num_pages: int
) -> StateShape:
    model = files.config
    page_size = page_size_of(config, model)
    return StateShape(
        max_rows=sizes.max_rows,
        pages_per_row=pages_per_row(model.context_length, page_size),
        max_steps=config.num_continuous_decode_steps,
        max_tokens=buckets.extend_tokens[-1],
        num_layers=model.num_layers if model.encoder is None else 0,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        dtype=jnp.dtype(model.dtype),
        pooled_size=model.pooling.size if model.pooling else 0,
        num_sparse_layers=sum(model.moe.is_sparse) if model.moe else 0,
        experts_per_token=model.moe.routing.top_k if model.moe else 0,
    )


def _expert_info(model: ModelConfig) -> ExpertInfo | None:
    if model.moe is None or not any(model.moe.is_sparse):
        return None
    return ExpertInfo(
        num_layers=model.num_layers,
        sparse_layers=[i for i, is_sparse in enumerate(model.moe.is_sparse) if is_sparse],
        num_experts=model.moe.num_experts,
        top_k=model.moe.routing.top_k,
    )


def _may_cache(config: EngineConfig, files: ModelFiles) -> bool:
    """Whether requests may use what others have computed."""
    pooling = files.config.pooling
    if files.config.encoder is not None:
        logger.info("No KV cache, no prefix cache: each token of an encoder sees its whole text.")
        return False
    if pooling is None or not pooling.needs_all_tokens:
        return not config.disable_radix_cache
    logger.info("No prefix cache: pooling by %s needs every token of a text.", pooling.mode)
    return False


def _embedding_info(pooling: PoolingConfig | None) -> EmbeddingInfo | None:
    if pooling is None:
        return None
    allowed = pooling.dimensions
    dimensions = None if allowed is None else list(allowed)
    return EmbeddingInfo(pooling.size, dimensions, list(pooling.labels), pooling.is_normalized)


def _encoder_info(model: ModelConfig) -> EncoderInfo | None:
    return None if model.encoder is None else EncoderInfo(model.encoder.num_token_types)


def _weight_loader(
    config: EngineConfig,
    files: ModelFiles,
    abstract,
    memory: MemoryPlan,
    tokenizer_folder: str | None,
    device: jax.Device,
) -> WeightLoader:
    served = Served(
        config=files.config,
        context_length=config.context_length,
        overrides=files.overrides,
        tokenizer=TokenizerIdentity(tokenizer_folder) if tokenizer_folder else None,
    )
    root = WeightsRoot([config.weights_root or root_of(files.folder)], config.download_dir)
    way, timeout = memory.weight_reload, config.weight_load_timeout
    return WeightLoader(abstract, served, root, way, device, timeout)


def _log_kv_cache(memory: MemoryPlan) -> None:
    half = memory.kv_cache_bytes / 2e9
    logger.info(
        "KV Cache is allocated. #tokens: %d, K size: %.2f GB, V size: %.2f GB",
        memory.max_total_tokens,
        half,
        half,
    )


def _log_header(
    config: EngineConfig,
    files: ModelFiles,
    device: jax.Device,
    shape: StateShape,
    buckets: Buckets,
) -> Header:
    options = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}
    return Header(
        version=VERSION,
        jaxserve=jaxserve.__version__,
        jax=jax.__version__,
        device=device.device_kind,
        config=EngineConfig(**options),  # of a server's no more than the engine knows
        model_folder=os.path.abspath(files.folder),
        model_digest=files.digest(config.load_format),
        shape=dataclasses.asdict(shape) | {"dtype": str(shape.dtype)},
        buckets=buckets,
    )


def find_device(config: EngineConfig) -> jax.Device:
    """Raises ValueError where JAX already runs elsewhere (it chooses once in a process's life), or
    the device cannot do what an option asks for."""
    try:
        device = jax.devices()[0]
    except (AssertionError, RuntimeError) as error:  # as JAX says it where a plugin is missing
        raise ValueError(
            f"--device {config.device}: JAX finds none here "
            f"({str(error) or type(error).__name__}); is jaxserve installed with its extra, "
            "'jaxserve[cuda12]', 'jaxserve[cuda13]' or 'jaxserve[tpu]'?"
        ) from error
    wanted = {"auto": device.platform, "cuda": "gpu"}.get(config.device, config.device)
    if device.platform != wanted:
        raise ValueError(f"--device {config.device}: JAX runs on {device.platform} here")
    if config.deterministic:
        batch_invariant.check(device.platform, "--deterministic")
    return device


def _load_tokenizer(config: EngineConfig, model_folder: str) -> tuple[Tokenizer | None, str | None]:
    if config.skip_tokenizer_init:
        return None, None
    folder = model_folder
    if config.tokenizer_path:
        folder = hub.resolve(config.tokenizer_path, {"tokenizer"}, download_dir=config.download_dir)
    return Tokenizer(folder), folder

"""From a model and its sizes to a runner: loads the weights while every bucket is compiled."""

import concurrent.futures
import logging
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxserve import weight_placement
from jaxserve.buckets import Buckets
from jaxserve.compiler import compile_programs, working_bytes
from jaxserve.config import EngineConfig
from jaxserve.memory_plan import MemoryPlan, format_bytes, free_host_memory
from jaxserve.model_loader import ModelFiles
from jaxserve.models.pooling import PoolingConfig
from jaxserve.runner import Runner
from jaxserve.state import StateShape
from jaxserve.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


def build_runner(
    model: tuple[nnx.GraphDef, nnx.State],
    load: Callable[[], nnx.State],
    shape: StateShape,
    buckets: Buckets,
    stopwatch: Stopwatch,
    check_programs: Callable[[int], None] = lambda num_bytes: None,
    *,
    deterministic: bool = False,
    pooling: PoolingConfig | None = None,
) -> Runner:
    """Compiles every bucket while the weights are loaded: neither needs the other.

    Args:
      model: from `create_model`.
      load: gives the parameters.
      stopwatch: gets the part "compile".
      check_programs: called with the bytes that the programs need while they run; may raise.
      deterministic: as `compile_programs` has it.

    Raises:
      ValueError: the device has no room for the state or for compiling.
      Whatever `load` and `check_programs` raise.
    """

    with concurrent.futures.ThreadPoolExecutor(1, "jaxserve-weights") as pool:
        loading = pool.submit(load)

        def on_compiled(done: int, total: int) -> None:
            if loading.done():
                loading.result()  # a checkpoint that does not fit ends the compiling too
            if done % 5 == 0 or done == total:
                logger.info("Compiling programs: %d/%d", done, total)

        try:
            with stopwatch.part("compile"):
                compiled = compile_programs(
                    *model,
                    shape,
                    buckets,
                    on_compiled,
                    deterministic=deterministic,
                    pooling=pooling,
                )
            num_bytes = working_bytes(compiled)
            logger.info(
                "Compiled in %.1f s. The programs need up to %s.",
                stopwatch.seconds["compile"],
                format_bytes(num_bytes),
            )
            check_programs(num_bytes)
            return Runner(compiled, loading.result(), shape, buckets.scores)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(f"out of memory, lower --mem-fraction-static: {error}") from error


def load_weights(
    config: EngineConfig,
    files: ModelFiles,
    abstract: nnx.State,
    memory: MemoryPlan,
    params: Any,
    stopwatch: Stopwatch,
) -> nnx.State:
    """The weights, on the device; and room for their successors, where those wait in the host's
    memory."""
    with stopwatch.part("weights"):
        if params is None:
            loaded = files.load(abstract, config.load_format, config.random_seed or 0)
        else:
            loaded = files.take(abstract, params)
    if memory.weight_reload == "host" and jax.default_backend() != "cpu":
        with stopwatch.part("pinned memory"):
            _reserve_pinned(loaded)
    return loaded


def _reserve_pinned(params: nnx.State) -> None:
    """So that the first reload finds the memory that later ones find."""
    if not weight_placement.reserve_pinned(jax.tree.leaves(params), free_host_memory()):
        logger.warning("the machine has no memory left for new weights: --weight-reload host fails")

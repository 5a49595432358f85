"""Compiles every program that the engine will run, ahead of time."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve import programs
from jaxserve.buckets import Buckets
from jaxserve.models import batch_invariant
from jaxserve.models.pooling import PoolingConfig
from jaxserve.state import State, StateShape
from jaxserve.step_plan import NUM_EXTRAS, PATCH_HEADER, SAMPLERS

COMPILERS = max(4, os.cpu_count() or 4)  # threads; XLA compiles outside the GIL
EXTRAS_LINES = 4  # in one upload: rows that need any seldom begin together

Programs = dict[tuple, jax.stages.Compiled]  # by name and sizes; see `_jobs`


def compile_programs(
    graphdef: nnx.GraphDef,
    abstract: nnx.State,
    shape: StateShape,
    buckets: Buckets,
    on_compiled: Callable[[int, int], None] = lambda done, total: None,
    *,
    pooling: PoolingConfig | None = None,
    deterministic: bool = False,
) -> Programs:
    """Compiles every bucket, in parallel. No weights are needed for it, and no state.

    Args:
      graphdef, abstract: from `create_model`; the weights will be on the first device.
      on_compiled: called with (done, total) after each program; may raise to end it.
      pooling: of a model that answers with vectors: no program decodes or samples then.
      deterministic: what a request gets depends on it alone, to the bit (`BatchInvariant`).
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    weights = tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf in jax.tree.leaves(abstract)
    )
    merge = programs.merger(graphdef, abstract, deterministic=deterministic)
    state = jax.eval_shape(shape.create)
    attention, compiler_options = None, None  # the best for the device, and XLA's own
    if deterministic:
        attention = batch_invariant.ATTENTION
        compiler_options = batch_invariant.COMPILER_OPTIONS
    jobs = _jobs(merge, attention, weights, state, buckets, PATCH_HEADER + shape.pages_per_row)
    if pooling is None:
        jobs |= _sampling_jobs(merge, attention, weights, state, buckets)
    else:
        jobs |= _pooling_jobs(merge, pooling, weights, state, buckets)
    return _compile_all(jobs, compiler_options, on_compiled)


def working_bytes(compiled: Programs) -> int:
    """Of the device's memory that the hungriest program takes while it runs, beside the weights
    and the state."""
    return max(_working_bytes(program) for program in compiled.values())


def _jobs(
    merge, attention: str | None, weights, state: State, buckets: Buckets, patch_width: int
) -> dict[tuple, tuple]:
    """What every engine runs, by its key: (function, arguments, donated argument)."""
    partial = functools.partial
    jobs: dict[tuple, tuple] = {("peek", "out"): (programs.peek, (state.out,), ())}
    for lines in buckets.patch_lines:
        size = lines * patch_width + len(state.batch)
        jobs["patch", lines] = (partial(programs.patch, lines), (state, _upload(size)), (0,))
    for count in buckets.copies if state.kv is not None else ():
        jobs["copy_pages", count] = (programs.copy_pages, (state, _upload(count, 3)), (0,))
    for tokens, rows in buckets.extend_shapes():
        function = partial(programs.extend, merge, attention, tokens, rows)
        arguments = (weights, state, _upload(3 * rows + tokens))
        jobs["extend", tokens, rows, True] = (function, arguments, (1,))
    if state.expert_ids is not None:
        jobs |= _peek_experts(state, buckets.extend_tokens)
    return jobs


def _peek_experts(state: State, sizes: Iterable[int]) -> dict[tuple, tuple]:
    return {
        ("peek_experts", tokens): (
            functools.partial(programs.peek_experts, tokens),
            (state.expert_ids,),
            (),
        )
        for tokens in sizes
    }


def _sampling_jobs(
    merge, attention: str | None, weights, state: State, buckets: Buckets
) -> dict[tuple, tuple]:
    """What an engine that predicts tokens runs beside that."""
    partial = functools.partial
    jobs: dict[tuple, tuple] = {
        ("peek", "tops"): (programs.peek, (state.tops,), ()),
        ("set_extras",): (
            programs.set_extras,
            (state, _upload(EXTRAS_LINES, 1 + NUM_EXTRAS)),
            (0,),
        ),
        ("set_counts",): (programs.set_counts, (state, _upload(1 + state.counts.shape[1])), (0,)),
    }
    if state.expert_ids is not None:
        sizes = [rows * steps for rows in buckets.decode_rows for steps in buckets.decode_steps]
        jobs |= _peek_experts(state, sizes)
    for wants_tops in (False, True):
        function = partial(programs.score, merge, wants_tops)
        arguments = (weights, state, _upload(buckets.scores, 3))
        jobs["score", wants_tops, True] = (function, arguments, ())
    for sampler in SAMPLERS:
        for rows in buckets.extend_rows:
            function = partial(programs.sample, merge, sampler, rows)
            jobs["sample", sampler, rows, True] = (function, (weights, state), (1,))
        for rows in buckets.decode_rows:
            for steps in buckets.decode_steps:
                function = partial(programs.decode, merge, attention, sampler, rows, steps)
                jobs["decode", sampler, rows, steps, True] = (function, (weights, state), (1,))
    return jobs


def _pooling_jobs(
    merge, pooling: PoolingConfig, weights, state: State, buckets: Buckets
) -> dict[tuple, tuple]:
    """What one that answers with vectors runs instead."""
    jobs: dict[tuple, tuple] = {("peek", "pooled"): (programs.peek, (state.pooled,), ())}
    for rows in buckets.extend_rows:
        function = functools.partial(programs.pool, merge, pooling, rows)
        jobs["pool", rows, True] = (function, (weights, state), (1,))
    for tokens, rows in buckets.extend_shapes() if pooling.needs_all_tokens else ():
        function = functools.partial(programs.accumulate, pooling.mode, tokens, rows)
        upload = _upload(3 * rows + tokens)
        jobs["accumulate", tokens, rows] = (function, (state, upload), (0,))
    return jobs


def _upload(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _working_bytes(program: jax.stages.Compiled) -> int:
    stats = program.memory_analysis()
    if stats is None:  # the backend does not tell
        return 0
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes + max(fresh, 0)


def _compile_all(
    jobs: dict[tuple, tuple],
    compiler_options: dict[str, Any] | None,
    on_compiled: Callable[[int, int], None],
) -> Programs:
    def compile_one(job):
        function, arguments, donated = job
        # Not keep_unused: with it a cache of JAX's keeps every program for good.
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        return lowered.compile(compiler_options)

    pool = concurrent.futures.ThreadPoolExecutor(COMPILERS)
    try:
        futures = {key: pool.submit(compile_one, job) for key, job in jobs.items()}
        for done, future in enumerate(concurrent.futures.as_completed(futures.values()), start=1):
            future.result()
            on_compiled(done, len(futures))
        return {key: future.result() for key, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)

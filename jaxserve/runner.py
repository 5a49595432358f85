"""Holds the weights, the state and the compiled programs; executes step plans."""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve import programs
from jaxserve.buckets import Buckets
from jaxserve.state import StateShape
from jaxserve.step_plan import PATCH_HEADER, StepPlan

SAMPLERS = ("greedy", "plain")
COMPILERS = 4  # threads; XLA compiles outside the GIL


class Runner:
    """Calls only programs compiled ahead of time: an unknown shape raises instead of compiling."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        shape: StateShape,
        buckets: Buckets,
        on_compiled: Callable[[int, int], None] = lambda done, total: None,
    ):
        """Compiles every bucket; calls `on_compiled(done, total)` after each."""
        self._pages_per_row = shape.pages_per_row
        self._weights, treedef = jax.tree.flatten(params)
        self._state = shape.create()
        self._programs = _compile_all(
            functools.partial(_merge, graphdef, treedef),
            tuple(self._weights),
            self._state,
            buckets,
            on_compiled,
        )
        self._weights = tuple(self._weights)

    def execute(self, plan: StepPlan) -> np.ndarray:
        """Runs one step and returns `State.out`, i32[R + 1, C], as it is after it."""
        upload = plan.patch_array(self._pages_per_row)
        if upload is not None:
            self._state = self._programs["patch", len(upload)](self._state, jax.device_put(upload))
        self._state = self._programs["forward", plan.num_tokens, plan.num_rows](
            self._weights, self._state, jax.device_put(plan.forward_array())
        )
        self._state = self._programs["sample", plan.sampler, plan.num_rows](
            self._weights, self._state, jax.device_put(plan.sample_rows_array())
        )
        return np.asarray(self._programs["peek",](self._state.out))


def _merge(graphdef, treedef, weights: tuple[jax.Array, ...]):
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))


def _compile_all(merge, weights, state, buckets: Buckets, on_compiled) -> dict[tuple, Any]:
    """Every program by its key, compiled in parallel."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    forward = functools.partial(programs.forward, merge)
    sample = functools.partial(programs.sample, merge)
    patch_width = PATCH_HEADER + state.page_table.shape[1]
    jobs: dict[tuple, tuple[Callable, tuple, tuple]] = {
        ("peek",): (programs.peek, (state.out,), ()),
    }
    for rows in buckets.patch_rows:
        jobs["patch", rows] = (programs.patch, (state, ints(rows, patch_width)), (0,))
    for num_tokens, num_rows in buckets.forward_shapes():
        upload = ints(2 * num_rows + num_tokens)
        function = functools.partial(forward, num_tokens, num_rows)
        jobs["forward", num_tokens, num_rows] = (function, (weights, state, upload), (1,))
    for sampler in SAMPLERS:
        for rows in buckets.sample_rows():
            function = functools.partial(sample, sampler)
            jobs["sample", sampler, rows] = (function, (weights, state, ints(rows)), (1,))

    def compile_one(job):
        function, arguments, donated = job
        return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()

    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        futures = {key: pool.submit(compile_one, job) for key, job in jobs.items()}
        for done, _ in enumerate(concurrent.futures.as_completed(futures.values()), start=1):
            on_compiled(done, len(futures))
    return {key: future.result() for key, future in futures.items()}

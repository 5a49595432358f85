"""Holds the weights, the state and the compiled programs; executes step plans."""

import concurrent.futures
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve import programs
from jaxserve.buckets import Buckets
from jaxserve.state import State, StateShape
from jaxserve.step_plan import PATCH_HEADER, StepPlan, ints

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
        leaves, treedef = jax.tree.flatten(params)
        self._weights = tuple(leaves)
        self._shape = shape
        self._patch_width = PATCH_HEADER + shape.pages_per_row
        self._state = shape.create()
        merge = functools.partial(_merge, graphdef, treedef)
        jobs = _jobs(merge, self._weights, self._state, buckets, self._patch_width)
        self._programs = _compile_all(jobs, on_compiled)

    def reset(self) -> None:
        """A state without requests, after a step has failed and taken the donated one with it."""
        self._state = self._shape.create()

    def dispatch(self, plan: StepPlan) -> jax.Array:
        """Enqueues one step; `read` waits for what it returns."""
        if plan.patch:
            upload = ints(plan.patch)
            num_lines = (len(upload) - self._shape.max_rows) // self._patch_width
            self._run("patch", num_lines, upload=upload)
        if plan.copies:
            upload = ints(plan.copies).reshape(-1, 3)
            self._run("copy_pages", len(upload), upload=upload)
        if plan.kind == "extend":
            self._run("extend", plan.num_tokens, plan.num_rows, True, upload=ints(plan.forward))
            self._run("sample", plan.sampler, plan.num_rows, True)
        else:
            self._run("decode", plan.sampler, plan.num_rows, plan.num_steps, True)
        fresh = self._programs["peek",](self._state.out)
        fresh.copy_to_host_async()
        return fresh

    def read(self, fresh: jax.Array) -> np.ndarray:
        """`State.out` as it was after the step, i32[K, R + 1, C]."""
        return np.asarray(fresh)

    def _run(self, *key, upload: np.ndarray | None = None) -> None:
        """Runs a program on the state; a last True in the key says that it wants the weights."""
        needs_weights = key[-1] is True
        arguments = (self._weights, self._state) if needs_weights else (self._state,)
        if upload is not None:
            arguments = (*arguments, jax.device_put(upload))
        self._state = self._programs[key](*arguments)


def _merge(graphdef, treedef, weights: tuple[jax.Array, ...]):
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))


def _jobs(merge, weights, state: State, buckets: Buckets, patch_width: int) -> dict[tuple, tuple]:
    """Every program by its key: (function, arguments, donated argument)."""

    def upload(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    partial = functools.partial
    model = merge, None  # None: the best attention for the device
    jobs: dict[tuple, tuple] = {("peek",): (programs.peek, (state.out,), ())}
    for lines in buckets.patch_lines:
        size = lines * patch_width + len(state.batch)
        jobs["patch", lines] = (partial(programs.patch, lines), (state, upload(size)), (0,))
    for count in buckets.copies:
        jobs["copy_pages", count] = (programs.copy_pages, (state, upload(count, 3)), (0,))
    for tokens, rows in buckets.extend_shapes():
        function = partial(programs.extend, *model, tokens, rows)
        arguments = (weights, state, upload(3 * rows + tokens))
        jobs["extend", tokens, rows, True] = (function, arguments, (1,))
    for sampler in SAMPLERS:
        for rows in buckets.extend_rows:
            function = partial(programs.sample, merge, sampler, rows)
            jobs["sample", sampler, rows, True] = (function, (weights, state), (1,))
        for rows in buckets.decode_rows:
            for steps in buckets.decode_steps:
                function = partial(programs.decode, *model, sampler, rows, steps)
                jobs["decode", sampler, rows, steps, True] = (function, (weights, state), (1,))
    return jobs


def _compile_all(jobs: dict[tuple, tuple], on_compiled: Callable[[int, int], None]):
    """Every program, compiled in parallel."""

    def compile_one(job):
        function, arguments, donated = job
        # A leaf that a program replaces unread is kept as its argument: left out, its buffer would
        # go to another leaf of its shape, addresses would change, and graphs be patched.
        jitted = jax.jit(function, donate_argnums=donated, keep_unused=True)
        return jitted.lower(*arguments).compile()

    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        futures = {key: pool.submit(compile_one, job) for key, job in jobs.items()}
        for done, _ in enumerate(concurrent.futures.as_completed(futures.values()), start=1):
            on_compiled(done, len(futures))
    return {key: future.result() for key, future in futures.items()}

"""Holds the weights, the state and the compiled programs; executes step plans."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from jaxserve.compiler import EXTRAS_LINES, Programs
from jaxserve.state import StateShape
from jaxserve.step_plan import NUM_EXTRAS, PATCH_HEADER, StepPlan, ints
from jaxserve.step_result import StepResult


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What a step will have produced: fresh arrays, which no later program takes."""

    num_steps: int
    out: jax.Array
    tops: jax.Array | None
    scores: list[jax.Array]
    num_scores: int
    pooled: jax.Array | None = None
    expert_ids: jax.Array | None = None


class Runner:
    """Calls only programs compiled ahead of time: an unknown shape raises instead of compiling."""

    def __init__(self, compiled: Programs, params: nnx.State, shape: StateShape, score_size: int):
        """Args:
        compiled: by `compile_programs`, for weights like `params` and a state of this shape.
        score_size: prompt tokens that one program scores.
        """
        leaves = jax.tree.leaves(params)
        self._weights: tuple[jax.Array | None, ...] = tuple(leaves)
        self.weight_specs = tuple(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves
        )
        self._shape, self._score_size = shape, score_size
        self._patch_width = PATCH_HEADER + shape.pages_per_row
        self._state = shape.create()
        self._programs = compiled

    @property
    def weights(self) -> tuple[jax.Array | None, ...]:
        """The leaves of the parameters, in the order of `jax.tree.leaves`; None where one was
        released. No program takes them: whoever holds the tuple may read it from any thread."""
        return self._weights

    def swap(self, leaves: Mapping[int, jax.Array]) -> None:
        """Puts others in the place of some leaves, or all. Nothing is compiled or copied; steps
        in flight keep theirs.

        Raises:
          ValueError: one has another shape, dtype or sharding; nothing was changed.
        """
        self.check_leaves(leaves)
        self._weights = tuple(leaves.get(i, leaf) for i, leaf in enumerate(self._weights))

    def check_leaves(self, leaves: Mapping[int, jax.Array]) -> None:
        """Raises ValueError for a leaf that has another shape, dtype or sharding than its own."""
        for number, leaf in leaves.items():
            spec = self.weight_specs[number]
            got, wanted = ((x.shape, str(x.dtype), x.sharding) for x in (leaf, spec))
            if got != wanted:
                raise ValueError(f"weight {number}: {got} cannot take the place of {wanted}")

    def overwrite(self, number: int, make: Callable[[], jax.Array]) -> None:
        """Lets go of a leaf before its successor is made, where there is no room for both. To be
        called with no step in flight. If `make` raises, the leaf is gone."""
        self._weights = (*self._weights[:number], None, *self._weights[number + 1 :])
        self.swap({number: make()})

    def release_weights(self) -> None:
        """Lets go of them, with no step in flight: their memory is free unless somebody else, such
        as a trainer in this process, holds them too."""
        self._weights = (None,) * len(self._weights)

    def release_state(self) -> None:
        """Gives the KV cache's memory back, until `reset`."""
        for leaf in jax.tree.leaves(self._state):
            leaf.delete()

    def reset(self) -> None:
        """A state without requests: after a step has failed and taken the donated one with it."""
        for leaf in jax.tree.leaves(self._state):
            leaf.delete()  # what is left of it: there is no room for two
        self._state = self._shape.create()

    def release(self) -> None:
        """Lets go of weights, state and programs; nothing can be dispatched any more."""
        self._programs.clear()
        self._weights, self._state = (None,) * len(self._weights), None

    def dispatch(self, plan: StepPlan) -> Dispatched:
        """Enqueues one step; `read` waits for what it returns."""
        self._change_rows(plan)
        if plan.copies:
            upload = ints(plan.copies).reshape(-1, 3)
            self._run("copy_pages", len(upload), upload=upload)
        if plan.kind == "extend":
            sizes, upload = (plan.num_tokens, plan.num_rows), jax.device_put(ints(plan.forward))
            self._run("extend", *sizes, True, upload=upload)
            if ("accumulate", *sizes) in self._programs:
                self._run("accumulate", *sizes, upload=upload)
            kind = ("pool",) if plan.sampler == "pool" else ("sample", plan.sampler)
            self._run(*kind, plan.num_rows, True)
        else:
            self._run("decode", plan.sampler, plan.num_rows, plan.num_steps, True)
        scores = self._score(plan)
        tops = pooled = expert_ids = None
        if plan.wants_tops:
            tops = self._programs["peek", "tops"](self._state.tops)
        if plan.sampler == "pool":
            pooled = self._programs["peek", "pooled"](self._state.pooled)
        if plan.wants_experts:
            peek = self._programs["peek_experts", plan.num_forwarded]
            expert_ids = peek(self._state.expert_ids)
        out = self._programs["peek", "out"](self._state.out)
        for fresh in (out, tops, pooled, expert_ids, *scores):
            if fresh is not None:
                fresh.copy_to_host_async()
        num_scores = len(plan.scores) // 12
        return Dispatched(plan.num_steps, out, tops, scores, num_scores, pooled, expert_ids)

    def read(self, fresh: Dispatched) -> StepResult:
        """Waits for the step."""
        scores = [np.asarray(part) for part in fresh.scores]
        return StepResult(
            drawn=np.asarray(fresh.out)[: fresh.num_steps].tolist(),
            tops=None if fresh.tops is None else np.asarray(fresh.tops),
            scores=np.concatenate(scores)[: fresh.num_scores] if scores else None,
            pooled=None if fresh.pooled is None else np.asarray(fresh.pooled),
            expert_ids=None if fresh.expert_ids is None else self._by_step(fresh),
        )

    @staticmethod
    def _by_step(fresh: Dispatched) -> np.ndarray:
        expert_ids = np.asarray(fresh.expert_ids)
        return expert_ids.reshape(fresh.num_steps, -1, *expert_ids.shape[1:])

    def _change_rows(self, plan: StepPlan) -> None:
        if plan.patch:
            upload = ints(plan.patch)
            num_lines = (len(upload) - self._shape.max_rows) // self._patch_width
            self._run("patch", num_lines, upload=upload)
        trash = np.zeros((1, 1 + NUM_EXTRAS), np.int32)
        trash[0, 0] = self._shape.max_rows
        for lines in _pieces(ints(plan.extras).reshape(-1, 1 + NUM_EXTRAS), EXTRAS_LINES, trash):
            self._run("set_extras", upload=lines)
        counts = ints(plan.counts)
        while len(counts):
            row, length = counts[:2]
            tokens, counts = counts[2 : 2 + length], counts[2 + length :]
            upload = np.bincount(tokens, minlength=self._shape.vocab_size).astype(np.int32)
            self._run("set_counts", upload=np.concatenate([[row], upload]).astype(np.int32))

    def _score(self, plan: StepPlan) -> list[jax.Array]:
        if not plan.scores:
            return []
        program = self._programs["score", plan.wants_tops, True]
        padding = np.array([[0, 0, self._shape.max_rows]], np.int32)
        lines = ints(plan.scores).reshape(-1, 3)
        return [
            program(self._weights, self._state, jax.device_put(piece))
            for piece in _pieces(lines, self._score_size, padding)
        ]

    def _run(self, *key, upload: np.ndarray | jax.Array | None = None) -> None:
        """Runs a program on the state; a last True in the key says that it wants the weights."""
        needs_weights = key[-1] is True
        arguments = (self._weights, self._state) if needs_weights else (self._state,)
        if upload is not None:
            arguments = (*arguments, jax.device_put(upload))
        self._state = self._programs[key](*arguments)


def _pieces(lines: np.ndarray, size: int, padding: np.ndarray) -> Iterator[np.ndarray]:
    """So many lines at a time, the last piece filled up with `padding`."""
    for start in range(0, len(lines), size):
        piece = lines[start : start + size]
        yield np.concatenate([piece, np.repeat(padding, size - len(piece), axis=0)])

"""A schedule, padded and packed into a step plan."""

import itertools

import numpy as np

from jaxserve.buckets import Buckets
from jaxserve.scheduler import Schedule
from jaxserve.step_plan import (
    LAST_TOKEN,
    PATCH_HEADER,
    StepPlan,
    pack_patch_row,
    pack_sampling,
)


class PlanBuilder:
    def __init__(self, buckets: Buckets, *, max_rows: int, pages_per_row: int):
        self._buckets = buckets
        self._trash_row = max_rows
        self._patch_width = PATCH_HEADER + pages_per_row
        self._steps = itertools.count()

    def build(self, schedule: Schedule) -> StepPlan:
        chunks = schedule.chunks
        tokens = [token for c in chunks for token in (c.tokens or [LAST_TOKEN])]
        num_tokens, num_rows = self._buckets.fit(len(tokens), len(chunks))

        forward = np.zeros(2 * num_rows + num_tokens, np.int32)
        rows, lengths, ids = np.split(forward, [num_rows, 2 * num_rows])
        rows[:] = self._trash_row
        rows[: len(chunks)] = [c.running.row for c in chunks]
        lengths[: len(chunks)] = [max(len(c.tokens), 1) for c in chunks]
        ids[: len(tokens)] = tokens

        sample_rows = np.full(num_rows, self._trash_row, np.int32)
        sample_rows[: len(chunks)] = [
            c.running.row if c.samples else self._trash_row for c in chunks
        ]
        greedy = all(c.running.request.sampling.is_greedy for c in chunks)
        return StepPlan(
            step=next(self._steps),
            num_tokens=num_tokens,
            num_rows=num_rows,
            sampler="greedy" if greedy else "plain",
            forward=forward.tobytes(),
            sample_rows=sample_rows.tobytes(),
            patch=self._patch(schedule),
        )

    def _patch(self, schedule: Schedule) -> bytes:
        """The rows of newly admitted requests; padding lines rewrite the trash row with zeros."""
        if not schedule.admitted:
            return b""
        padded = next(p for p in self._buckets.patch_rows if p >= len(schedule.admitted))
        lines = np.zeros((padded, self._patch_width), np.int32)
        lines[:, 0] = self._trash_row
        for line, running in zip(lines, schedule.admitted, strict=False):
            sampling = pack_sampling(running.request)
            line[:] = pack_patch_row(
                running.row, running.num_computed, sampling, running.pages, self._patch_width
            )
        return lines.tobytes()

"""A schedule, padded and packed into a step plan."""

import itertools

import numpy as np

from jaxserve.buckets import Buckets, smallest
from jaxserve.live_request import LiveRequest, PageCopy, Schedule
from jaxserve.step_plan import (
    KEEP,
    LAST_TOKEN,
    NUM_BANNED,
    NUM_STOP_IDS,
    PATCH_HEADER,
    RUNNING,
    SAMPLERS,
    SAMPLING_START,
    STOPPED,
    Sampler,
    StepPlan,
    has_extras,
    pack_extras,
    pack_sampling,
)


class PlanBuilder:
    """Remembers what the device already knows, so that a plan says only what changes."""

    def __init__(self, buckets: Buckets, *, max_rows: int, pages_per_row: int):
        self._buckets = buckets
        self._max_rows = max_rows
        self._width = PATCH_HEADER + pages_per_row
        self._steps = itertools.count()
        self._batch: list[int] = []  # the rows of the last decode step

    def build(self, schedule: Schedule, *, wants_experts: bool = False) -> StepPlan:
        rows = [chunk.live.row for chunk in schedule.chunks]
        samplers = {chunk.live.sampler for chunk in schedule.chunks}
        sampler: Sampler = next((name for name in reversed(SAMPLERS) if name in samplers), "pool")
        if schedule.is_decode:
            num_rows = smallest(self._buckets.decode_rows, len(rows))
            is_new_batch, self._batch = rows != self._batch, rows
            return StepPlan(
                step=next(self._steps),
                kind="decode",
                num_tokens=num_rows,
                num_rows=num_rows,
                num_steps=schedule.num_steps,
                sampler=sampler,
                patch=self._pack_patch(schedule, is_new_batch),
                extras=self._pack_extras(schedule),
                counts=self._pack_counts(schedule),
                copies=self._pack_copies(schedule.copies),
                wants_tops=sampler == "full" and self._wants_tops(schedule),
                wants_experts=wants_experts or self._wants_experts(schedule),
            )
        num_tokens = sum(chunk.num_packed for chunk in schedule.chunks)
        num_tokens, num_rows = self._buckets.fit(num_tokens, len(rows))
        return StepPlan(
            step=next(self._steps),
            kind="extend",
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_steps=1,
            sampler=sampler,
            forward=self._pack_forward(schedule, num_tokens, num_rows),
            patch=self._pack_patch(schedule, is_new_batch=False),
            extras=self._pack_extras(schedule),
            counts=self._pack_counts(schedule),
            copies=self._pack_copies(schedule.copies),
            scores=self._pack_scores(schedule),
            wants_tops=sampler == "full" and self._wants_tops(schedule),
            wants_experts=wants_experts or self._wants_experts(schedule),
        )

    def reset(self) -> None:
        """The device knows nothing any more."""
        self._batch = []

    def _pack_forward(self, schedule: Schedule, num_tokens: int, num_rows: int) -> bytes:
        packed = np.zeros(3 * num_rows + num_tokens, np.int32)
        rows, lengths, samples, ids = np.split(packed, [num_rows, 2 * num_rows, 3 * num_rows])
        rows[:] = self._max_rows
        count = len(schedule.chunks)
        rows[:count] = [chunk.live.row for chunk in schedule.chunks]
        lengths[:count] = [chunk.num_packed for chunk in schedule.chunks]
        samples[:count] = [chunk.num_samples > 0 for chunk in schedule.chunks]
        tokens = [token for chunk in schedule.chunks for token in (chunk.tokens or [LAST_TOKEN])]
        ids[: len(tokens)] = tokens
        return packed.tobytes()

    def _pack_patch(self, schedule: Schedule, is_new_batch: bool) -> bytes:
        changed = len(schedule.new_rows) + len(schedule.changed_rows)
        if not changed and not is_new_batch:
            return b""
        num_lines = smallest(self._buckets.patch_lines, changed)
        packed = np.full(num_lines * self._width + self._max_rows, self._max_rows, np.int32)
        lines = packed[: -self._max_rows].reshape(num_lines, self._width)
        lines[changed:] = self._trash_line()
        for line, live in zip(lines, schedule.new_rows, strict=False):
            self._pack_line(line, live)
            line[1:4] = live.num_matched, KEEP, RUNNING
        for line, live in zip(lines[len(schedule.new_rows) :], schedule.changed_rows, strict=False):
            self._pack_line(line, live)
            line[1:4] = KEEP
        packed[-self._max_rows :][: len(self._batch)] = self._batch
        return packed.tobytes()

    def _pack_line(self, line: np.ndarray, live: LiveRequest) -> None:
        request = live.request
        stop_ids = live.stop_checker.stop_ids[:NUM_STOP_IDS]
        line[:] = 0
        line[0] = live.row
        line[4] = len(request.prompt_ids) + request.max_new_tokens - 1
        line[5:SAMPLING_START] = -1
        line[5 : 5 + len(stop_ids)] = stop_ids
        line[SAMPLING_START:PATCH_HEADER] = pack_sampling(request)
        line[PATCH_HEADER : PATCH_HEADER + len(live.pages)] = live.pages

    def _trash_line(self) -> np.ndarray:
        line = np.zeros(self._width, np.int32)
        line[0], line[3] = self._max_rows, STOPPED
        line[5:SAMPLING_START] = -1
        return line

    @staticmethod
    def _pack_extras(schedule: Schedule) -> bytes:
        return b"".join(
            pack_extras(live.row, live.request, live.stop_checker.stop_ids[:NUM_BANNED]).tobytes()
            for live in schedule.new_rows
            if has_extras(live.request)
        )

    @staticmethod
    def _pack_counts(schedule: Schedule) -> bytes:
        packed: list[int] = []
        for live in schedule.new_rows:
            if live.request.sampling.counts_tokens:
                output = live.tokens[len(live.request.prompt_ids) :]
                packed += [live.row, len(output), *output]
        return np.array(packed, np.int32).tobytes()

    @staticmethod
    def _pack_scores(schedule: Schedule) -> bytes:
        packed: list[tuple[int, int, int]] = []
        offset = 0  # of the chunk among the packed tokens
        for chunk in schedule.chunks:
            live, first = chunk.live, chunk.first_score
            targets = range(first, first + chunk.num_scores)
            before = offset - chunk.start - 1  # where the token before the first one would be
            packed += [(before + target, live.tokens[target], live.row) for target in targets]
            offset += chunk.num_packed
        return np.array(packed, np.int32).tobytes()

    @staticmethod
    def _wants_tops(schedule: Schedule) -> bool:
        asked = (chunk.live.logprobs for chunk in schedule.chunks)
        return any(logprobs is not None and logprobs.wants_tops for logprobs in asked)

    @staticmethod
    def _wants_experts(schedule: Schedule) -> bool:
        return any(chunk.live.request.experts_from is not None for chunk in schedule.chunks)

    def _pack_copies(self, copies: list[PageCopy]) -> bytes:
        """Padding copies nothing of the trash page to the trash page."""
        if not copies:
            return b""
        packed = np.zeros((smallest(self._buckets.copies, len(copies)), 3), np.int32)
        packed[: len(copies)] = [(copy.source, copy.target, copy.num_tokens) for copy in copies]
        return packed.tobytes()

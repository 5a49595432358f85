"""How often each expert was taken, of every token that a step has computed."""

import collections
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Int16, Int64

from jaxserve import expert_files
from jaxserve.expert_files import ForwardPass
from jaxserve.live_request import Schedule
from jaxserve.messages import ExpertInfo

logger = logging.getLogger(__name__)
Mode = Literal["stat", "per_pass", "per_token"]


class ExpertRecorder:
    """Is told of every step while it is on. A stop that only the host sees (a stop string) comes a
    step late: that step computes a token more, and it counts."""

    def __init__(
        self,
        info: ExpertInfo,
        mode: Mode | None = None,
        most_passes: int | None = None,
        folder: str | pathlib.Path = "/tmp",
    ):
        """Args:
        mode: None counts over all passes, without a limit, for a CSV.
        most_passes: that a mode keeps, the latest ones; None keeps all.
        folder: of a mode's files.
        """
        self.is_on = False
        self._folder = pathlib.Path(folder)
        self._info, self._mode, self._most_passes = info, mode, most_passes
        self._num_passes = 0
        self._reset()

    def start(self) -> None:
        """From nothing, also where it is on already."""
        if self.is_on:
            logger.warning("The expert distribution is recorded already: beginning anew.")
        self._reset()
        logger.info("Resetting expert distribution record...")
        self.is_on = True

    def stop(self) -> None:
        if not self.is_on:
            logger.warning("The expert distribution is not being recorded.")
        self.is_on = False

    def take(self, schedule: Schedule, expert_ids: Int16[np.ndarray, "K T L k"]) -> None:
        """A step that has been read and told to the scheduler."""
        for number, chosen in enumerate(expert_ids):
            is_live = chosen[:, 0, 0] >= 0
            if not is_live.any():  # the dispatch was longer than its requests
                continue
            if self._mode == "per_token":
                self._passes.append(self._pass_of(schedule, number, chosen, is_live))
            elif self._mode is None:
                self._total += self._count(chosen[is_live])
            else:
                self._passes.append((self._num_passes, self._count(chosen[is_live])))
            self._num_passes += 1

    def dump(self) -> Callable[[], pathlib.Path]:
        """Forgets what it has, but for a function that writes it to a file and returns which."""
        info, folder, passes, total = self._info, self._folder, list(self._passes), self._total
        self._reset()
        logger.info("Resetting expert distribution record...")
        if self._mode is None:
            self.is_on = False
            return lambda: expert_files.write_counts(total)
        if self._mode == "per_token":
            return lambda: expert_files.write_tokens(folder, passes, info)
        numbers, counts = [number for number, _ in passes], [count for _, count in passes]
        stacked = np.stack(counts) if counts else np.zeros((0, *total.shape), np.int32)
        if self._mode == "per_pass":
            return lambda: expert_files.write_passes(folder, numbers, stacked)
        return lambda: expert_files.write_statistics(folder, stacked)

    def _reset(self) -> None:
        self._passes: collections.deque = collections.deque(maxlen=self._most_passes)
        self._total = np.zeros((self._info.num_layers, self._info.num_experts), np.int64)

    def _pass_of(
        self, schedule: Schedule, number: int, chosen: np.ndarray, is_live: np.ndarray
    ) -> ForwardPass:
        inputs = list(_inputs(schedule, number))
        table = np.full((len(chosen), 2), -1, np.int32)
        table[: len(inputs)] = inputs
        tokens, positions = table[is_live].T
        return ForwardPass(self._num_passes, schedule.is_decode, tokens, positions, chosen[is_live])

    def _count(self, chosen: Int16[np.ndarray, "T L k"]) -> Int64[np.ndarray, "layers E"]:
        """Layers without experts count nothing."""
        info = self._info
        first = np.array(info.sparse_layers)[:, None] * info.num_experts  # of each layer's counts
        flat = (first + chosen).reshape(-1)
        counts = np.bincount(flat, minlength=info.num_layers * info.num_experts)
        return counts.reshape(info.num_layers, info.num_experts)


def _inputs(schedule: Schedule, number: int) -> Iterator[tuple[int, int]]:
    """Token and position of each place of the `number`-th decode step of a dispatch."""
    for chunk in schedule.chunks:
        first = chunk.start + number
        for position in range(first, first + chunk.num_packed):
            known = chunk.live.tokens
            yield (known[position] if position < len(known) else -1), position

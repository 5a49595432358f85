"""What the host reads of a step. No jax: the scheduler takes it in."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxserve.request import LogprobParams, Logprobs
from jaxserve.step_plan import TOPS_PARTS

# By row: token, what has become of the row, the token's logprob as float bits.
Draws = Mapping[int, Sequence[int]] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class StepResult:
    drawn: Sequence[Draws]  # by decode step of the dispatch
    tops: np.ndarray | None = None  # i32[K, R+1, NUM_TOPS], where anybody asked for them
    scores: np.ndarray | None = None  # i32[S, 1 or 1 + NUM_TOPS], of `StepPlan.scores`
    pooled: np.ndarray | None = None  # f32[R+1, W], the vectors of rows that have ended
    # i16[K, T, L, k], where anybody asked for them: in each decode step, of each token that the
    # model ran over, in each layer that has experts; -1 for padding.
    expert_ids: np.ndarray | None = None

    def drawn_logprobs(self, row: int, count: int, params: LogprobParams) -> Logprobs:
        """Of the first `count` tokens of a row."""
        bits = np.array([step[row][2] for step in self.drawn[:count]], np.int32)
        lines = self.tops[:count, row] if params.wants_tops and self.tops is not None else None
        return _unpack(bits, lines, params)

    def embedding(self, row: int) -> bytes:
        """The vector of a row, f32[W]."""
        return self.pooled[row].tobytes()

    def experts_of(self, first_token: int, count: int) -> np.ndarray:
        """i16[n, L, k] of one request's tokens, of those that were computed.

        Args:
          first_token, count: where they are among the tokens of a step: one and the same in each
            step of a dispatch.
        """
        chosen = self.expert_ids[:, first_token : first_token + count]
        chosen = chosen.reshape(-1, *chosen.shape[2:])
        return chosen[chosen[:, 0, 0] >= 0]

    def prompt_logprobs(self, start: int, count: int, params: LogprobParams) -> Logprobs:
        """Of `count` scored tokens."""
        lines = self.scores[start : start + count]
        return _unpack(lines[:, 0], lines[:, 1:] if params.wants_tops else None, params)


def _unpack(bits: np.ndarray, lines: np.ndarray | None, params: LogprobParams) -> Logprobs:
    chosen = np.ascontiguousarray(bits).view(np.float32).tolist()
    if lines is None:
        return Logprobs(chosen)
    ids, values, probes = np.split(np.ascontiguousarray(lines), np.cumsum(TOPS_PARTS)[:-1], axis=1)
    values = np.ascontiguousarray(values).view(np.float32)[:, : params.top_num].tolist()
    ids = ids[:, : params.top_num].tolist()
    probes = np.ascontiguousarray(probes).view(np.float32)[:, : len(params.token_ids)].tolist()
    return Logprobs(
        chosen,
        [list(zip(*pair, strict=True)) for pair in zip(values, ids, strict=True)]
        if params.top_num
        else [],
        probes if params.token_ids else [],
    )

"""A request while the scheduler has it, and the part of it that a step computes."""

import dataclasses
from typing import Any

from jaxserve.request import LogprobParams, Request
from jaxserve.step_plan import Sampler, sampler_of
from jaxserve.stop_checker import StopChecker


@dataclasses.dataclass(eq=False)
class LiveRequest:
    """Waiting until it has a row.

    Steps are dispatched before the last one's tokens are known, so what is dispatched and what is
    known are counted apart.
    """

    request: Request
    stop_checker: StopChecker
    arrival: int
    tokens: list[int]  # the prompt, and the output as far as it is known
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    node: Any = None  # of the prefix cache, locked while there is a row
    num_shared: int = 0  # of `pages`, the first ones, which belong to the prefix cache
    num_matched: int = 0  # tokens that it found in the cache when it got its row
    num_computed: int = 0  # tokens whose keys and values dispatched steps have written
    num_inflight: int = 0  # tokens that dispatched steps sample and nobody has read yet
    prefill_len: int = 0  # tokens to compute before the first one is sampled
    num_scored: int = 0  # tokens of the prompt whose logprobs are known, or not asked for
    next_score: int = 0  # the first token of the prompt that no dispatched step scores
    num_routed: int = 0  # tokens whose experts are known, or not asked for
    epoch: int = 0  # of its stay in a row: what is read of an earlier one is dropped
    cached_tokens: int | None = None  # of the prompt, at its first admission
    num_retractions: int = 0
    waits_for: "tuple[LiveRequest, int] | None" = None  # whose prompt, in which epoch
    is_mixed: bool = False  # its pages hold what different weights have computed
    sampler: Sampler = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.sampler = sampler_of(self.request)
        # What precedes the first token that is told of is not known to the caller: no logprob.
        logprobs, num_prompt = self.request.logprobs, len(self.request.prompt_ids)
        self.num_scored = num_prompt if logprobs is None else min(logprobs.start + 1, num_prompt)
        self.num_routed = self.request.experts_from or 0

    @property
    def logprobs(self) -> LogprobParams | None:
        return self.request.logprobs

    @property
    def most_matched(self) -> int:
        """Tokens that the prefix cache may give it: one at least is left to compute, and all that
        logprobs need, or that somebody wants to know the experts of."""
        most = len(self.tokens) - 1
        if self.num_scored < len(self.request.prompt_ids):
            most = self.num_scored - 1
        if self.request.experts_from is not None:
            most = min(most, self.num_routed)
        return most

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Tokens that it may still sample, counting none that is in flight."""
        return self.request.max_new_tokens - self.num_output - self.num_inflight

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= self.prefill_len

    @property
    def num_committed(self) -> int:
        """Known tokens whose keys and values are surely in its pages: not those of the last one
        sampled, which a step that found it finished did not compute."""
        return min(self.num_computed, max(self.prefill_len, len(self.tokens) - 1))

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: higher priority, then earlier arrival; a retracted one keeps its own."""
        return -self.request.priority, self.arrival


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one step does for one request."""

    live: LiveRequest
    epoch: int
    tokens: list[int]  # to compute; none for the last sampled one
    num_samples: int  # tokens that the step gives it at most
    start: int = 0  # the position of the first of them
    first_score: int = 0  # the first token of the prompt that the step scores
    num_scores: int = 0

    @property
    def num_packed(self) -> int:
        """Places among the tokens of the step: the last sampled token takes one."""
        return max(len(self.tokens), 1)

    @property
    def is_stale(self) -> bool:
        return self.live.epoch != self.epoch


@dataclasses.dataclass(frozen=True)
class PageCopy:
    """The part of a cached page that a request continues."""

    source: int
    target: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One step."""

    chunks: list[Chunk]  # decode rows first
    num_steps: int  # decode steps in one dispatch
    new_rows: list[LiveRequest]  # admitted
    changed_rows: list[LiveRequest]  # with other pages than the device knows
    copies: list[PageCopy]
    num_cached_tokens: int  # of the admitted

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        return self.num_prompt_tokens == 0

"""Which requests run in the next step: first come, first served, in plain Python.

A request is admitted when a row is free and the pool holds all pages that it can ever need, so a
running request never waits for memory. Prompts longer than a chunk are computed over several
steps, and decoding rows go on in those same steps.
"""

import dataclasses
from collections import deque

from jaxserve.page_allocator import PageAllocator
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.stop_checker import StopChecker


@dataclasses.dataclass(eq=False)
class RunningRequest:
    """A request, and the row and pages it holds once it is admitted."""

    request: Request
    stop_checker: StopChecker
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0  # prompt tokens in the cache
    num_output: int = 0

    @property
    def num_prompt_left(self) -> int:
        return len(self.request.prompt_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return self.num_prompt_left == 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The part of one request that a step computes: prompt tokens, or one decode token."""

    running: RunningRequest
    tokens: list[int]  # empty for the last sampled token
    samples: bool  # the step gives this request its next token


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One step: its admitted requests and its chunks, decode rows first."""

    admitted: list[RunningRequest]
    chunks: list[Chunk]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class Scheduler:
    def __init__(
        self, allocator: PageAllocator, *, page_size: int, max_rows: int, max_prefill_tokens: int
    ):
        self.allocator = allocator
        self._page_size = page_size
        self._max_prefill_tokens = max_prefill_tokens
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self.max_rows = max_rows
        self.waiting: deque[RunningRequest] = deque()
        self.running: dict[str, RunningRequest] = {}  # by rid, in order of admission

    def add(self, request: Request, stop_checker: StopChecker) -> None:
        """Raises ValueError where the pool could never hold the request, or its id is taken."""
        if self._pages_needed(request) > self.allocator.num_pages - 1:
            raise ValueError(f"{request.rid} needs more pages than the KV cache has")
        if request.rid in self.running or any(w.request.rid == request.rid for w in self.waiting):
            raise ValueError(f"Duplicate request ID detected: {request.rid}")
        self.waiting.append(RunningRequest(request, stop_checker))

    def abort(self, rid: str) -> RequestUpdate | None:
        """Ends the request; None where it is not known, which is no error: it may have finished."""
        if rid in self.running:
            return self._finish(self.running[rid], [], FinishReason("abort", message="Aborted"))
        for waiting in self.waiting:
            if waiting.request.rid == rid:
                self.waiting.remove(waiting)
                reason = FinishReason("abort", message="Abort in waiting queue")
                return RequestUpdate(rid, [], reason)
        return None

    def schedule(self) -> Schedule | None:
        """The next step, or None where there is nothing to do."""
        admitted = self._admit()
        decoding = [r for r in self.running.values() if r.is_decoding]
        chunks = [Chunk(running, [], samples=True) for running in decoding]
        budget = self._max_prefill_tokens
        for running in self.running.values():
            if running.is_decoding or not budget:
                continue
            start = running.num_computed
            tokens = running.request.prompt_ids[start : start + budget]
            budget -= len(tokens)
            samples = len(tokens) == running.num_prompt_left
            chunks.append(Chunk(running, tokens, samples))
        return Schedule(admitted, chunks) if chunks else None

    def update(self, schedule: Schedule, sampled: dict[int, int | None]) -> list[RequestUpdate]:
        """Takes in a step's result: the token that each sampling row drew, None for a row whose
        scores were not finite. Returns the news."""
        updates = []
        for chunk in schedule.chunks:
            running = chunk.running
            if self.running.get(running.request.rid) is not running:
                continue  # aborted while the step ran
            running.num_computed += len(chunk.tokens)
            if chunk.samples:
                updates.append(self._take_token(running, sampled[running.row]))
        return updates

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of running requests whose keys and values are in the cache."""
        return sum(r.num_computed + max(r.num_output - 1, 0) for r in self.running.values())

    def check_integrity(self) -> None:
        self.allocator.check_integrity()
        held = [page for r in self.running.values() for page in r.pages]
        assert len(set(held)) == len(held) == self.allocator.num_used, "each page has one owner"
        rows = [r.row for r in self.running.values()] + self._free_rows
        assert sorted(rows) == list(range(self.max_rows)), "each row has one owner"

    def _admit(self) -> list[RunningRequest]:
        admitted = []
        while self.waiting and self._free_rows:
            head = self.waiting[0]
            pages = self.allocator.allocate(self._pages_needed(head.request))
            if pages is None:
                break
            self.waiting.popleft()
            head.row, head.pages = self._free_rows.pop(), pages
            self.running[head.request.rid] = head
            admitted.append(head)
        return admitted

    def _pages_needed(self, request: Request) -> int:
        """For all tokens but the last, which is sampled and never computed."""
        num_tokens = len(request.prompt_ids) + max(request.max_new_tokens - 1, 0)
        return -(-num_tokens // self._page_size)

    def _take_token(self, running: RunningRequest, token: int | None) -> RequestUpdate:
        if token is None:
            reason = FinishReason(
                "abort",
                message="the model's scores are not finite",
                status_code=500,
                err_type="InternalServerError",
            )
            return self._finish(running, [], reason)
        if running.request.max_new_tokens == 0:  # only its prompt was wanted
            return self._finish(running, [], FinishReason("length", length=0))
        running.num_output += 1
        reason = running.stop_checker.push(token)
        if reason is not None:
            return self._finish(running, [token], reason)
        return RequestUpdate(running.request.rid, [token])

    def _finish(
        self, running: RunningRequest, token_ids: list[int], reason: FinishReason
    ) -> RequestUpdate:
        self.allocator.free(running.pages)
        self._free_rows.append(running.row)
        del self.running[running.request.rid]
        return RequestUpdate(running.request.rid, token_ids, reason)

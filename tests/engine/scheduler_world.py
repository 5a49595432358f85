"""A scheduler with its device as `EngineCore` runs them, and what must hold of them."""

import collections
import dataclasses

import numpy as np
import pytest

from jaxserve.buckets import Buckets
from jaxserve.live_request import LiveRequest, Schedule
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.radix_cache import RadixCache
from jaxserve.request import FinishReason, LogprobParams, Request, RequestUpdate
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import NUM_STOP_IDS
from jaxserve.stop_checker import StopChecker
from tests.engine.fake_device import EOS, NAMESPACES, Device, chain_of, score_of, solo

FILLER_STOPS = tuple(range(900, 900 + NUM_STOP_IDS))  # leave the device no place for EOS


@dataclasses.dataclass(frozen=True)
class Limits:
    page_size: int
    num_pages: int  # without the trash page
    max_rows: int
    max_prefill_tokens: int
    num_decode_steps: int
    policy: str
    cached: bool
    conservativeness: float


class World:
    """A scheduler with its device as `EngineCore` runs them, and what must hold of them."""

    def __init__(self, limits: Limits, scheduler_type: type[Scheduler] = Scheduler):
        self.limits = limits
        self.allocator = PageAllocator(limits.num_pages + 1)
        cache = RadixCache(limits.page_size, self.allocator) if limits.cached else None
        self.scheduler = scheduler_type(
            self.allocator,
            cache,
            page_size=limits.page_size,
            max_rows=limits.max_rows,
            max_prefill_tokens=limits.max_prefill_tokens,
            num_decode_steps=limits.num_decode_steps,
            policy=limits.policy,
            conservativeness=limits.conservativeness,
        )
        buckets = Buckets.make(limits.max_rows, limits.max_prefill_tokens, growth=2)
        self.builder = PlanBuilder(
            buckets, max_rows=limits.max_rows, pages_per_row=limits.num_pages
        )
        self.device = Device(
            limits.page_size, limits.max_rows, limits.num_pages, limits.num_decode_steps
        )
        self.inflight: collections.deque = collections.deque()
        self.requests: dict[str, Request] = {}
        self.order: dict[str, tuple[int, int]] = {}
        self.output: dict[str, list[int]] = {}
        self.prompt_scores: dict[str, list[float]] = collections.defaultdict(list)
        self.ended: dict[str, FinishReason] = {}
        self.aborted: set[str] = set()

    # What happens.

    def submit(self, prompt: list[int], max_new_tokens: int, priority: int, kind: int) -> None:
        """`kind` chooses a namespace, whether the device knows the stop token, and the prompt
        position from which logprobs are asked for, if any."""
        rid = "job" + len(self.requests) * "0"  # each the beginning of all that follow
        stops = FILLER_STOPS if kind & 2 else ()
        sampling = SamplingParams(stop_token_ids=stops)
        namespace = NAMESPACES[kind & 1]
        logprobs = LogprobParams(min(kind // 8, len(prompt))) if kind & 4 else None
        request = Request(rid, prompt, sampling, max_new_tokens, 0, priority, namespace, logprobs)
        room = self.limits.num_pages * self.limits.page_size
        stop_checker = StopChecker(request, frozenset({EOS}), tokenizer=None)
        if len(prompt) + max(max_new_tokens - 1, 0) > room:
            with pytest.raises(ValueError, match="needs more pages"):
                self.scheduler.add(request, stop_checker)
            return
        self.scheduler.add(request, stop_checker)
        self.order[rid] = -priority, len(self.requests)
        self.requests[rid], self.output[rid] = request, []

    def dispatch(self) -> bool:
        running = sorted(self.scheduler.running, key=self.order_of)
        schedule = self.scheduler.schedule()
        if running:
            assert running[0] in self.scheduler.running, "the oldest was retracted"
        if schedule is None:
            assert self.inflight or self.scheduler.is_idle, "somebody waits for nothing"
            return False
        self.check_schedule(schedule)
        out = self.device.dispatch(self.builder.build(schedule), schedule.new_rows)
        self.inflight.append((schedule, out))
        return True

    def read(self) -> None:
        schedule, out = self.inflight.popleft()
        for update in self.scheduler.update(schedule, out):
            self.take(update)

    def step(self) -> None:
        """As `EngineCore.step` does."""
        is_dispatched = self.dispatch()
        if self.inflight and not (is_dispatched and len(self.inflight) <= 1):
            self.read()

    def abort(self, number: int) -> None:
        rid = "job" + number * "0"
        self.aborted.add(rid)
        update = self.scheduler.abort(rid)
        if rid not in self.requests or rid in self.ended:
            assert update is None
        else:
            self.take(update)

    def flush(self) -> None:
        is_idle = len(self.ended) == len(self.requests)
        assert self.scheduler.flush() == is_idle
        assert not is_idle or self.allocator.num_used == 0

    def fail(self, *, is_scheduled: bool) -> None:
        """A step fails, before or after others are in flight."""
        if is_scheduled and (schedule := self.scheduler.schedule()):
            self.builder.build(schedule)
        self.inflight.clear()
        self.scheduler.retract_all()
        self.builder.reset()
        self.device.reset()
        assert self.allocator.num_used == 0

    def drain(self) -> None:
        """Without new requests all end soon, and nothing is left of them."""
        alive = [r for rid, r in self.requests.items() if rid not in self.ended]
        tokens = sum(len(r.prompt_ids) + r.max_new_tokens + 2 for r in alive)
        for _ in range(2 + tokens * (1 + len(alive))):
            if self.scheduler.is_idle and not self.inflight:
                break
            self.step()
        self.check()
        assert set(self.ended) == set(self.requests), "not all have ended"
        self.flush()
        self.check()

    # What must hold.

    def order_of(self, live: LiveRequest) -> tuple[int, int]:
        return self.order[live.request.rid]

    def check_schedule(self, schedule: Schedule) -> None:
        assert schedule.num_prompt_tokens <= self.limits.max_prefill_tokens
        chunked = [chunk.live for chunk in schedule.chunks]
        assert len(set(chunked)) == len(chunked) and set(chunked) <= set(self.scheduler.running)
        assert schedule.num_steps == (self.limits.num_decode_steps if schedule.is_decode else 1)
        if schedule.new_rows and self.limits.policy == "fcfs":
            admitted = [self.order_of(live) for live in schedule.new_rows]
            waiting = [self.order_of(live) for live in self.scheduler.waiting]
            assert admitted == sorted(admitted), "who came first goes first"
            assert not waiting or admitted[-1] < min(waiting)

    def take(self, update: RequestUpdate) -> None:
        rid, reason = update.rid, update.finish_reason
        assert rid not in self.ended, "nothing comes after the end"
        request = self.requests[rid]
        self.output[rid] += update.token_ids
        tokens, end = solo(request)
        assert self.output[rid] == tokens[: len(self.output[rid])], "not the output of a solo run"
        assert update.cached_tokens < len(request.prompt_ids)
        self.take_logprobs(request, update)
        if reason is None:
            return
        self.ended[rid] = reason
        if reason.type == "abort" and reason.status_code is None:
            assert rid in self.aborted
        else:
            assert self.output[rid] == tokens and reason.type == end

    def take_logprobs(self, request: Request, update: RequestUpdate) -> None:
        """Each is told once, in order, with the news of its token; those of the prompt first."""
        if request.logprobs is None:
            assert update.logprobs is None and update.prompt_logprobs is None
            return
        if update.prompt_logprobs is not None:
            self.prompt_scores[request.rid] += update.prompt_logprobs.chosen
        first = request.logprobs.start + 1
        expected = self.scores_of(request.prompt_ids, first, request.namespace)
        told = self.prompt_scores[request.rid]
        assert told == expected[: len(told)]
        if not update.token_ids:
            return
        assert told == expected, "tokens come after all logprobs of the prompt"
        output = self.output[request.rid]
        first = len(request.prompt_ids) + len(output) - len(update.token_ids)
        tokens = [*request.prompt_ids, *output]
        assert update.logprobs.chosen == self.scores_of(tokens, first, request.namespace)

    @staticmethod
    def scores_of(tokens: list[int], first: int, namespace: str) -> list[float]:
        chain = chain_of(tokens, namespace)
        return [score_of(chain[i - 1], tokens[i]) for i in range(first, len(tokens))]

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        alive = [live.request.rid for live in (*scheduler.running, *scheduler.waiting)]
        assert sorted(alive) == sorted(set(self.requests) - set(self.ended))
        locks = collections.Counter()
        for live in scheduler.running:
            assert len(set(live.pages)) == len(live.pages) and live.num_committed <= len(
                live.tokens
            )
            tokens = live.tokens[: live.num_committed]
            self.check_content(tokens, live.request.namespace, live.pages)
            node = live.node
            while node is not None:
                locks[id(node)] += 1
                node = node.parent
        if scheduler.cache is not None:
            for node in scheduler.cache.nodes():
                assert node.lock_count == locks[id(node)], "locked by who uses it, and no other"
                self.check_content(*path_of(node))

    def check_content(self, tokens: list[int], namespace: str, pages: list[int]) -> None:
        size = self.limits.page_size
        for position, expected in enumerate(chain_of(tokens, namespace)):
            slot = pages[position // size], position % size
            assert self.device.slots.get(slot) == (position, expected), "not what it is kept for"


def path_of(node) -> tuple[list[int], str, list[int]]:
    """The tokens, namespace and pages from the root to the end of a cache's node."""
    tokens, pages = b"", []
    while node.parent is not None:
        tokens, pages = node.tokens + tokens, node.pages + pages
        node = node.parent
    return np.frombuffer(tokens, np.int32).tolist(), node.namespace, pages

"""`EngineCore` with all it decides by, on a fake device, and what must hold of it at any time."""

import collections
import dataclasses
import itertools
import sys
import types

import numpy as np

from jaxserve.buckets import Buckets
from jaxserve.engine_core import MOST_FAILURES
from jaxserve.live_request import LiveRequest, Schedule
from jaxserve.messages import AbortRequest, AddRequest, Call
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_log import StepLog
from jaxserve.step_plan import NUM_STOP_IDS, StepPlan
from tests.engine import invariants
from tests.engine.fake_device import EOS, NAMESPACES, Device, solo
from tests.engine.mutation import REAL, System

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
    max_waiting: int | None


class Fault(Exception):
    """What a device may do at any time."""


class FakeRunner:
    """A runner of the fake device. Fails once where `fault` says: "before" a step has run, "after"
    it, or at its "read"."""

    def __init__(self, device: Device, scheduler: Scheduler):
        self.device, self.scheduler = device, scheduler
        self.fault: str | None = None

    def dispatch(self, plan: StepPlan) -> np.ndarray:
        self.fail_at("before")
        before = dict(self.device.slots)
        out = self.device.dispatch(plan, self.scheduler.running)
        self.check_written({slot for slot, _ in before.items() ^ self.device.slots.items()})
        self.fail_at("after")
        return np.array(out)

    def read(self, out: np.ndarray) -> np.ndarray:
        self.fail_at("read")
        return out

    def reset(self) -> None:
        self.device.reset()

    def fail_at(self, place: str) -> None:
        if self.fault == place:
            self.fault = None
            raise Fault

    def check_written(self, slots: set[tuple[int, int]]) -> None:
        """Nobody else's page, no free one, and none that others may be reading."""
        written = {page for page, _ in slots}
        assert written <= set(invariants.private_pages(self.scheduler)), "not theirs to write"


class World:
    def __init__(self, limits: Limits, seen: collections.Counter, system: System = REAL):
        """`seen` counts what has happened, so that a test can tell whether everything did."""
        self.limits, self.seen = limits, seen
        self.scheduler = make_scheduler(limits, system)
        self.allocator = self.scheduler.allocator
        self.device = Device(
            limits.page_size, limits.max_rows, limits.num_pages, limits.num_decode_steps
        )
        self.runner = FakeRunner(self.device, self.scheduler)
        self.core = make_core(self, system)
        self.requests: dict[str, Request] = {}
        self.order: dict[str, tuple[int, int]] = {}
        self.output: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.ended: dict[str, FinishReason] = {}
        self.aborted: set[str] = set()
        self.arrivals = itertools.count()

    @property
    def inflight(self) -> list[Schedule]:
        return [schedule for schedule, _ in self.core._inflight]

    # What happens.

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int,
        priority: int,
        kind: int,
        *,
        again: int | None = None,
    ) -> None:
        """`kind` chooses a namespace, and whether the device knows the stop token; `again` the id
        of an earlier request, which may be alive."""
        number = len(self.requests) if again is None else again
        rid = "job" + number * "0"  # each the beginning of all that follow
        stops = FILLER_STOPS if kind & 2 else ()
        sampling = SamplingParams(stop_token_ids=stops)
        namespace = NAMESPACES[kind & 1]
        request = Request(rid, prompt, sampling, max_new_tokens, 0, priority, namespace)
        status = self.refusal_of(request)
        news = [update for out in self.core.handle(AddRequest(request)) for update in out.updates]
        if status is not None:
            statuses = [(update.rid, update.finish_reason.status_code) for update in news]
            assert statuses == [(rid, status)], "not refused"
            self.seen[f"refused with {status}"] += 1
            return
        assert not news
        self.order[rid] = -priority, next(self.arrivals)
        self.requests[rid], self.output[rid] = request, []
        for of_earlier in (self.ended, self.cached):
            of_earlier.pop(rid, None)
        self.aborted.discard(rid)

    def refusal_of(self, request: Request) -> int | None:
        """The status with which it must be refused."""
        room = self.limits.num_pages * self.limits.page_size
        if len(request.prompt_ids) + max(request.max_new_tokens - 1, 0) > room:
            return 400
        if request.rid in self.requests.keys() - self.ended.keys():
            return 400
        limit = self.limits.max_waiting
        return 503 if limit is not None and len(self.scheduler.waiting) >= limit else None

    def step(self) -> None:
        output = self.core.step()
        if output is None:
            assert self.scheduler.is_idle, "somebody waits for nothing"
            return
        for update in output.updates:
            self.take(update)

    def dispatch(self) -> None:
        """One step further ahead than the engine runs."""
        self.core._dispatch()

    def read(self) -> None:
        for update in self.core._read():
            self.take(update)

    def abort(self, number: int) -> None:
        rid = "job" + number * "0"
        is_alive = rid in self.requests and rid not in self.ended
        self.aborted.add(rid)
        is_running = rid in [live.request.rid for live in self.scheduler.running]
        self.seen[f"aborted {'running' if is_running else 'waiting' if is_alive else 'gone'}"] += 1
        news = [update for out in self.core.handle(AbortRequest(rid)) for update in out.updates]
        assert [update.rid for update in news] == [rid] * is_alive
        for update in news:
            self.take(update)
        assert not is_alive or rid in self.ended

    def flush(self) -> None:
        is_idle = len(self.ended) == len(self.requests)
        (reply,) = self.core.handle(Call(0, "flush_cache"))
        assert reply.value == is_idle
        assert not is_idle or self.allocator.num_used == 0
        self.seen["flushed" if is_idle else "not flushed"] += 1

    def fail(self, place: str) -> None:
        """A step fails, where it comes so far; never so often that the engine gives up."""
        if self.core._num_failures + 1 >= MOST_FAILURES:
            return
        self.runner.fault = place
        self.step()
        if self.runner.fault is None:
            self.seen[f"failed at {place}"] += 1
            assert not self.inflight and not self.scheduler.running
            assert self.allocator.num_used == 0, "nothing of what was computed is trusted"
        self.runner.fault = None

    def drain(self) -> None:
        """Without new requests all end soon, and nothing is left of them."""
        alive = [r for rid, r in self.requests.items() if rid not in self.ended]
        tokens = sum(len(r.prompt_ids) + r.max_new_tokens + 2 for r in alive)
        for _ in range(2 + tokens * (1 + len(alive))):
            if not self.core.has_work:
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
        assert all(chunk.tokens or chunk.num_samples for chunk in schedule.chunks)
        chunked = [chunk.live for chunk in schedule.chunks]
        assert len(set(chunked)) == len(chunked) > 0
        assert set(chunked) <= set(self.scheduler.running)
        for live in chunked:  # one token is drawn even where none is wanted
            assert live.num_left >= min(live.request.max_new_tokens - 1, 0), "one token too many"
        assert schedule.num_steps in (1, self.limits.num_decode_steps)
        self.seen["copied a partial page"] += len(schedule.copies)
        self.seen["several decode steps"] += schedule.num_steps > 1
        self.seen["part of a prompt"] += any(not chunk.num_samples for chunk in schedule.chunks)
        self.seen["decoded beside a prompt"] += len({bool(c.tokens) for c in schedule.chunks}) == 2
        admitted = [self.order_of(live) for live in schedule.new_rows]
        waiting = [self.order_of(live) for live in self.scheduler.waiting]
        if self.limits.policy == "lpm":  # by what is cached among those of one priority
            admitted, waiting = ([order[0] for order in orders] for orders in (admitted, waiting))
        if admitted:
            assert admitted == sorted(admitted), "who came first goes first"
            assert not waiting or admitted[-1] <= min(waiting), "nobody is overtaken"

    def take(self, update: RequestUpdate) -> None:
        rid, reason = update.rid, update.finish_reason
        assert rid not in self.ended, "nothing comes after the end"
        request = self.requests[rid]
        self.output[rid] += update.token_ids
        tokens, end = solo(request)
        assert self.output[rid] == tokens[: len(self.output[rid])], "not the output of a solo run"
        assert update.cached_tokens < len(request.prompt_ids)
        assert update.cached_tokens == self.cached.setdefault(rid, update.cached_tokens)
        if reason is None:
            return
        self.ended[rid] = reason
        self.seen[f"ended by {reason.type} {reason.status_code or ''}".strip()] += 1
        self.seen["used the cache"] += update.cached_tokens > 0
        self.seen["retracted"] += update.num_retractions
        if reason.type == "abort" and reason.status_code is None:
            assert rid in self.aborted
        else:
            assert self.output[rid] == tokens and reason.type == end
            assert reason.length in (None, len(tokens))

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        alive = [live.request.rid for live in (*scheduler.running, *scheduler.waiting)]
        assert sorted(alive) == sorted(set(self.requests) - set(self.ended))
        assert len(scheduler.running) <= self.limits.max_rows
        invariants.pages_have_one_owner(scheduler)
        invariants.locks_are_exact(scheduler)
        invariants.requests_fit_their_pages(scheduler, self.limits.page_size)
        invariants.pages_hold_what_requests_need(scheduler, self.device)
        invariants.pages_hold_what_the_tree_says(scheduler, self.device)


def make_scheduler(limits: Limits, system: System) -> Scheduler:
    allocator = system.page_allocator.PageAllocator(limits.num_pages + 1)
    cache = system.radix_cache.RadixCache(limits.page_size, allocator) if limits.cached else None
    return system.scheduler.Scheduler(
        allocator,
        cache,
        page_size=limits.page_size,
        max_rows=limits.max_rows,
        max_prefill_tokens=limits.max_prefill_tokens,
        num_decode_steps=limits.num_decode_steps,
        policy=limits.policy,
        max_waiting=limits.max_waiting,
        conservativeness=limits.conservativeness,
    )


def make_core(world: World, system: System):
    """An `EngineCore` whose steps are looked at, and which recovers from `Fault` alone."""

    class Core(system.engine_core.EngineCore):
        def _dispatch(self) -> bool:
            running = sorted(world.scheduler.running, key=world.order_of)
            is_dispatched = super()._dispatch()
            if running:
                assert running[0] in world.scheduler.running, "the oldest was retracted"
            if is_dispatched:
                world.check_schedule(world.inflight[-1])
            return is_dispatched

        def _read(self) -> list[RequestUpdate]:
            world.seen["late result"] += any(c.is_stale for c in world.inflight[0].chunks)
            return super()._read()

        def _recover(self) -> None:
            if not isinstance(sys.exception(), Fault):
                raise
            super()._recover()

    limits = world.limits
    buckets = Buckets.make(limits.max_rows, limits.max_prefill_tokens, growth=2)
    builder = system.plan_builder.PlanBuilder(
        buckets, max_rows=limits.max_rows, pages_per_row=limits.num_pages
    )
    info = types.SimpleNamespace(eos_token_ids=[EOS])  # all that a step asks of it
    log = StepLog(world.scheduler, interval=40, clock=lambda: 0.0)
    return Core(info, world.scheduler, builder, world.runner, None, log)

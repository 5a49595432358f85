"""`EngineCore` with all it decides by, on a fake device, and what must hold of it at any time."""

import collections
import contextlib
import dataclasses
import itertools
import types

from jaxserve.buckets import Buckets
from jaxserve.engine_core import MOST_FAILURES
from jaxserve.live_request import LiveRequest, Schedule
from jaxserve.messages import AbortRequest, AddRequest, Call
from jaxserve.request import LogprobParams, Request, RequestUpdate
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.serving_state import ServingState
from jaxserve.step_log import StepLog
from jaxserve.step_plan import NUM_STOP_IDS
from tests.engine import invariants
from tests.engine.answer import Answer
from tests.engine.fake_device import EOS, NAMESPACES, Device
from tests.engine.fake_runner import FakeRunner, Fault
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


class World:
    def __init__(self, limits: Limits, seen: collections.Counter, system: System = REAL):
        """`seen` counts what has happened, so that a test can tell whether everything did."""
        self.limits, self.seen = limits, seen
        self.scheduler = make_scheduler(limits, system)
        self.device = Device(
            limits.page_size, limits.max_rows, limits.num_pages, limits.num_decode_steps
        )
        self.runner = FakeRunner(self.device, self.scheduler)
        self.core = make_core(self, system)
        self.answers: dict[str, Answer] = {}
        self.arrivals = itertools.count()

    @property
    def inflight(self) -> list[Schedule]:
        return [schedule for schedule, _ in self.core._inflight]

    def alive(self) -> dict[str, Answer]:
        return {rid: answer for rid, answer in self.answers.items() if answer.end is None}

    # What happens.

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int,
        priority: int,
        kind: int,
        again: int = -1,
        experts_from: int | None = None,
    ) -> None:
        """`kind` chooses a namespace, whether the device knows the stop token, and the prompt
        position from which logprobs are asked for, if any; `again` an id that was used before."""
        rid = rid_of(len(self.answers) if again < 0 else again)
        request = Request(
            rid,
            prompt,
            SamplingParams(stop_token_ids=FILLER_STOPS if kind & 2 else ()),
            max_new_tokens,
            seed=0,
            priority=priority,
            namespace=NAMESPACES[kind & 1],
            logprobs=LogprobParams(min(kind // 8, len(prompt))) if kind & 4 else None,
            experts_from=None if experts_from is None else min(experts_from, len(prompt)),
        )
        status = self.refusal_of(request)
        news = [update for out in self.core.handle(AddRequest(request)) for update in out.updates]
        if status is not None:
            statuses = [(update.rid, update.finish_reason.status_code) for update in news]
            assert statuses == [(rid, status)], "not refused"
            self.seen[f"refused with {status}"] += 1
            return
        assert not news
        order = -priority, next(self.arrivals)
        self.answers[rid] = Answer(request, order, self.device.version)

    def refusal_of(self, request: Request) -> int | None:
        """The status with which it must be refused."""
        room = self.limits.num_pages * self.limits.page_size
        if len(request.prompt_ids) + max(request.max_new_tokens - 1, 0) > room:
            return 400
        if request.rid in self.alive():
            return 400
        limit = self.limits.max_waiting
        return 503 if limit is not None and len(self.scheduler.waiting) >= limit else None

    def step(self) -> None:
        output = self.core.step()
        if output is None:
            assert self.scheduler.is_idle, "somebody waits for nothing"
            return
        self.take(output.updates)

    def dispatch(self) -> None:
        """One step further ahead than the engine runs."""
        if not self.core._is_state_lost:
            self.core._dispatch()

    def read(self) -> None:
        self.take(self.core._read())

    def take(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            answer = self.answers[update.rid]
            answer.take(update)
            if (end := answer.end) is not None:
                self.seen[f"ended by {end.type} {end.status_code or ''}".strip()] += 1
                self.seen["used the cache"] += update.cached_tokens > 0
                self.seen["retracted"] += update.num_retractions
                self.seen["logprobs of a prompt"] += answer.num_scored > 0
                if answer.num_routed:
                    self.seen["experts told"] += 1
                    self.seen["experts told, used the cache"] += update.cached_tokens > 0
                    self.seen["experts told, retracted"] += update.num_retractions > 0

    def abort(self, rid: str) -> None:
        answer = self.alive().get(rid)
        is_running = rid in [live.request.rid for live in self.scheduler.running]
        self.seen[f"aborted {'running' if is_running else 'waiting' if answer else 'gone'}"] += 1
        if answer is not None:
            answer.is_aborted = True
        news = [update for out in self.core.handle(AbortRequest(rid)) for update in out.updates]
        assert [update.rid for update in news] == [rid] * (answer is not None)
        self.take(news)
        assert rid not in self.alive()

    def flush(self) -> None:
        is_idle = not self.alive()
        (reply,) = self.core.handle(Call(0, "flush_cache"))
        assert reply.value == is_idle
        assert not is_idle or self.scheduler.allocator.num_used == 0
        self.seen["flushed" if is_idle else "not flushed"] += 1

    def reload(self, way: str) -> None:
        """Other weights, between two steps: those who run go on "in place" or begin anew; or the
        weights "fail", and nothing changes."""
        for output in self.core.drain():
            self.take(output.updates)
        if way == "retract":
            self.scheduler.retract_all()
        if way == "fail":
            self.fail_to_reload()
            return
        computed = {live.request.rid: live.num_computed for live in self.scheduler.running}
        self.core.change_weights(lambda runner: runner.change_weights())
        for rid, answer in self.alive().items():
            answer.change_weights(self.device.version, computed.get(rid, 0))
        self.seen[f"reloaded {way} with {'some' if computed else 'none'} running"] += 1

    def fail_to_reload(self) -> None:
        def put(runner: FakeRunner) -> None:
            raise Fault

        cached = {id(node): tuple(node.pages) for node in invariants.nodes_of(self.scheduler)}
        with contextlib.suppress(Fault):
            self.core.change_weights(put)
        assert cached == {
            id(node): tuple(node.pages) for node in invariants.nodes_of(self.scheduler)
        }
        self.seen["reload failed"] += 1

    def fail(self, place: str) -> None:
        """A step fails, where it comes so far."""
        self.runner.fault = place
        self.step()
        if self.runner.fault is None:
            self.seen[f"failed at {place}"] += 1
            assert not self.inflight and not self.scheduler.running
            assert self.scheduler.allocator.num_used == 0, "what was computed is not trusted"
        self.runner.fault = None

    def drain(self) -> None:
        """Without new requests all end soon, and nothing is left of them. Each step brings the
        oldest further, and it is never retracted: it computes at most once more what it lost."""
        requests = [answer.request for answer in self.alive().values()]
        tokens = sum(len(r.prompt_ids) + r.max_new_tokens + 2 for r in requests)
        for number in range(2 * tokens):
            if not self.core.has_work:
                break
            self.step()
            if number % 8 == 0:
                self.check()
        self.check()
        assert not self.alive(), "not all have ended"
        self.flush()
        self.check()

    # What must hold.

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        lives = (*scheduler.running, *scheduler.waiting, *scheduler.held)
        live = [one.request.rid for one in lives]
        assert sorted(live) == sorted(self.alive()), "each is running, waiting or told of its end"
        assert len(scheduler.running) <= self.limits.max_rows
        invariants.pages_have_one_owner(scheduler)
        invariants.locks_are_exact(scheduler)
        invariants.requests_fit_their_pages(scheduler, self.limits.page_size)
        invariants.pages_hold_what_requests_need(scheduler, self.device, self.chain_of)
        invariants.pages_hold_what_the_tree_says(scheduler, self.device)

    def chain_of(self, live: LiveRequest) -> list[int]:
        return self.answers[live.request.rid].chain_of(live.num_committed)

    def check_schedule(self, schedule: Schedule) -> None:
        assert schedule.num_prompt_tokens <= self.limits.max_prefill_tokens
        assert schedule.num_steps == (self.limits.num_decode_steps if schedule.is_decode else 1)
        assert schedule.chunks, "a step of nothing"
        assert all(chunk.tokens or chunk.num_samples for chunk in schedule.chunks)
        chunked = [chunk.live for chunk in schedule.chunks]
        assert len(set(chunked)) == len(chunked) and set(chunked) <= set(self.scheduler.running)
        for live in chunked:  # one token is drawn even where none is wanted
            assert live.num_left >= min(live.request.max_new_tokens - 1, 0), "one token too many"
        self.check_order(schedule.new_rows)
        self.seen["copied a partial page"] += len(schedule.copies)
        self.seen["several decode steps"] += schedule.num_steps > 1
        self.seen["part of a prompt"] += any(not chunk.num_samples for chunk in schedule.chunks)
        self.seen["decoded beside a prompt"] += len({bool(c.tokens) for c in schedule.chunks}) == 2

    def check_order(self, new_rows: list[LiveRequest]) -> None:
        admitted = [self.order_of(live) for live in new_rows]
        patient = [one for one in self.scheduler.waiting if self.scheduler.waits_for_prompt(one)]
        self.seen["waited for another's prompt"] += bool(patient)
        waiting = [self.order_of(one) for one in self.scheduler.waiting if one not in patient]
        if self.limits.policy == "lpm":  # by what is cached among those of one priority
            admitted, waiting = ([order[0] for order in orders] for orders in (admitted, waiting))
        if admitted:
            assert admitted == sorted(admitted), "who came first goes first"
            assert not waiting or admitted[-1] <= min(waiting), "nobody is overtaken for nothing"

    def order_of(self, live: LiveRequest) -> tuple[int, int]:
        return self.answers[live.request.rid].order


def rid_of(number: int) -> str:
    """Each is the beginning of all that follow."""
    return "job" + number * "0"


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
        least_shared=2 * limits.page_size,
    )


def make_core(world: World, system: System):
    """An `EngineCore` whose steps are looked at, and which recovers from `Fault` alone."""

    class Core(system.engine_core.EngineCore):
        def _dispatch(self) -> bool:
            running = sorted(world.scheduler.running, key=world.order_of)
            must_admit = not running and bool(world.scheduler.waiting)
            is_dispatched = super()._dispatch()
            for live in world.scheduler.running:
                world.answers[live.request.rid].enter_row(live.epoch)
            if running:
                assert running[0] in world.scheduler.running, "the oldest was retracted"
            if is_dispatched:
                world.check_schedule(world.inflight[-1])
            assert is_dispatched and world.inflight[-1].new_rows or not must_admit, "nobody runs"
            return is_dispatched

        def _read(self) -> list[RequestUpdate]:
            world.seen["late result"] += any(c.is_stale for c in world.inflight[0].chunks)
            return super()._read()

        def _count_failure(self, error: Exception) -> None:
            if not isinstance(error, Fault):
                raise error
            self._num_failures %= MOST_FAILURES - 1  # it never gives up
            super()._count_failure(error)

    limits = world.limits
    buckets = Buckets.make(limits.max_rows, limits.max_prefill_tokens, growth=2)
    builder = system.plan_builder.PlanBuilder(
        buckets, max_rows=limits.max_rows, pages_per_row=limits.num_pages
    )
    info = types.SimpleNamespace(eos_token_ids=[EOS])  # all that a step asks of it
    log = StepLog(world.scheduler, interval=40, clock=lambda: 0.0)
    return Core(
        info,
        world.scheduler,
        builder,
        world.runner,
        tokenizer=None,  # no step asks for it
        log=log,
        loader=None,  # nor for these
        served_weights=types.SimpleNamespace(abstract=None),
        state=ServingState("", "", weight_version=""),
        compile_counter=None,
    )

"""Any history of requests, steps, aborts and failures, drawn at random."""

import collections
import logging
import sys

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.engine.mutation import REAL, System
from tests.engine.scheduler_world import Limits, World, rid_of

BASES = ([100, 101, 102] * 30, [101, 100, 100, 102] * 20)  # prompts share their beginnings
LIMITS = st.builds(
    Limits,
    page_size=st.sampled_from([1, 2, 4, 16]),
    num_pages=st.integers(4, 12),
    max_rows=st.integers(1, 5),
    max_prefill_tokens=st.sampled_from([3, 5, 7, 19]),
    num_decode_steps=st.sampled_from([1, 3]),
    policy=st.sampled_from(["fcfs", "fcfs", "lpm"]),
    cached=st.sampled_from([True, True, True, False]),
    conservativeness=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    max_waiting=st.sampled_from([None, None, None, 4]),
)
HISTORIES = settings(
    stateful_step_count=25,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
HALF = st.integers(0, 2**24 - 1)  # of longer ones most are drawn short
BITS = st.builds(lambda high, low: high << 24 | low, HALF, HALF)


class SchedulerMachine(RuleBasedStateMachine):
    system: System = REAL
    seen: collections.Counter = collections.Counter()  # in all examples together

    @initialize(limits=LIMITS)
    def start(self, limits):
        self.seen["examples"] += 1
        self.world = World(limits, self.seen, self.system)

    @rule(bits=BITS)
    def submit(self, bits):
        """A prompt that begins like others, and differs at any offset of a page."""

        def take(count: int) -> int:
            nonlocal bits
            bits, value = divmod(bits, count)
            return value

        limits = self.world.limits
        kind = take(4) if take(3) == 0 else 0
        if take(3) == 0:  # logprobs, from some position of the prompt on
            kind += 4 + 8 * take(20)
        room = min(limits.num_pages * limits.page_size, 24)
        base = BASES[take(3) == 0]
        prompt = base[: take(room * 2 // 3)] + [100 + take(3) for _ in range(1 + take(3))]
        experts_from = take(12) * 2 if take(4) == 1 else None
        self.world.submit(prompt, take(10), take(3) // 2, kind, experts_from=experts_from)
        if take(2):  # as "n" does
            self.world.submit(prompt, take(10), 0, kind, experts_from=experts_from)
        if take(6) == 1:
            self.world.submit(prompt, 1, 0, kind, again=take(len(self.world.answers) or 1))

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.world.step()
            self.world.check()

    @rule()
    def dispatch(self):
        if len(self.world.inflight) < 2:
            self.world.dispatch()

    @rule()
    def read(self):
        if self.world.inflight:
            self.world.read()

    @rule(bits=HALF)
    def abort(self, bits):
        """One that runs, or any, or one that never was."""
        world = self.world
        rids = [*world.answers, rid_of(len(world.answers))]
        if bits % 2 and world.scheduler.running:
            rids = [live.request.rid for live in world.scheduler.running]
        world.abort(rids[bits // 2 % len(rids)])

    @rule(way=st.sampled_from(["in place", "in place", "retract", "fail"]))
    def reload(self, way):
        self.world.reload(way)

    @rule(place=st.sampled_from(["flush", "before", "after", "read"]))
    def flush_or_fail(self, place):
        if place == "flush":
            self.world.flush()
        else:
            self.world.fail(place)

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if sys.exception() is None and hasattr(self, "world"):
            self.world.drain()


def run_histories(most: int, system: System = REAL) -> collections.Counter:
    """So many, or until one fails. Returns what was seen in them."""
    phases = tuple(Phase) if system is REAL else (Phase.generate,)  # who looks for a bug has it
    seen: collections.Counter = collections.Counter()
    machine = type("Machine", (SchedulerMachine,), {"system": system, "seen": seen})
    logger = logging.getLogger("jaxserve.engine_core")  # tells of every failure at length
    try:
        logger.disabled = True
        run_state_machine_as_test(
            machine, settings=settings(HISTORIES, max_examples=most, phases=phases)
        )
    finally:
        logger.disabled = False
        print(f"{seen['examples']} histories")
    return seen

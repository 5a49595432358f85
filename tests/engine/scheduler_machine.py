"""Any history of requests, steps, aborts and failures, drawn at random."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxserve.scheduler import Scheduler
from tests.engine.scheduler_world import Limits, World

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
    conservativeness=st.sampled_from([0.0, 0.3, 1.0]),
)
HISTORIES = settings(
    max_examples=300,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
BITS = st.integers(0, 2**40 - 1)  # one draw each: drawing takes most of the time


class SchedulerMachine(RuleBasedStateMachine):
    scheduler_type: type[Scheduler] = Scheduler

    @initialize(limits=LIMITS)
    def start(self, limits):
        self.world = World(limits, self.scheduler_type)

    def submit_one(self, bits: int) -> None:
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
        prompt = base[: take(room)] + [100 + take(3) for _ in range(1 + take(3))]
        self.world.submit(prompt, take(10), take(3) // 2, kind)

    @rule(bits=BITS)
    def submit(self, bits):
        self.submit_one(bits)

    @rule(bits=BITS)
    def submit_two(self, bits):
        self.submit_one(bits)
        self.submit_one(bits // 7)

    @rule(count=st.integers(1, 4))
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

    @rule(bits=BITS)
    def abort(self, bits):
        """Often one of the last, which are likely to be alive."""
        count = len(self.world.requests)
        self.world.abort(max(count - 1 - bits % 4, 0) if bits % 5 else count + 1)

    @rule(bits=BITS)
    def flush_or_fail(self, bits):
        if bits % 3:
            self.world.flush()
        else:
            self.world.fail(is_scheduled=bool(bits & 1))

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()

"""One compiled runner behind as many engines as a test wants.

What costs is to compile. How many tokens a step may take, how many pages there are, whether
prefixes are cached, how many steps a dispatch decodes: all that the scheduler decides on the host.
So a lab compiles one runner, with more rows, pages and kinds of steps than any one engine needs,
and an engine is a new scheduler in front of it. It has the device for itself until the next one is
made, which finds in its pages what others have left there.
"""

import dataclasses
import itertools
import time
import types
from collections.abc import Callable

import jax.numpy as jnp

from jaxserve.buckets import Buckets
from jaxserve.compile_counter import CompileCounter
from jaxserve.engine_core import EngineCore
from jaxserve.live_request import Schedule
from jaxserve.messages import AbortRequest, AddRequest, StepOutput
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.radix_cache import RadixCache
from jaxserve.request import Request
from jaxserve.runner import Runner
from jaxserve.scheduler import Policy, Scheduler
from jaxserve.state import StateShape
from jaxserve.step_log import StepLog
from tests.engine.oracle import MOST_TOKENS, Answer, Oracle

MOST_CACHED = 32  # longest texts that the cache holds, so that nothing is evicted unasked
MOST_STEPS = 10_000  # more than any handful of short requests needs


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a runner is compiled for."""

    model: str
    page_size: int
    decode_rows: tuple[int, ...]
    decode_steps: tuple[int, ...]

    @property
    def max_rows(self) -> int:
        return self.decode_rows[-1]

    @property
    def most_chunk(self) -> int:
        """Prompt tokens that fit into a step beside a decoding row each."""
        return MOST_TOKENS - self.max_rows

    def __str__(self) -> str:
        return f"{self.model}-page{self.page_size}"


class WatchedScheduler(Scheduler):
    """Keeps what it has decided: the evidence that what a test is about did happen."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.schedules: list[Schedule] = []

    def schedule(self) -> Schedule | None:
        schedule = super().schedule()
        if schedule is not None:
            self.schedules.append(schedule)
        return schedule

    def num_chunks(self, rid: str) -> int:
        """Steps that computed some of its prompt."""
        chunks = (chunk for schedule in self.schedules for chunk in schedule.chunks)
        return sum(chunk.live.request.rid == rid and bool(chunk.tokens) for chunk in chunks)

    @property
    def most_rows(self) -> int:
        return max(len(schedule.chunks) for schedule in self.schedules)

    @property
    def num_mixed(self) -> int:
        """Steps in which some decoded while others' prompts were computed."""
        return sum(
            schedule.num_prompt_tokens > 0 and not all(chunk.tokens for chunk in schedule.chunks)
            for schedule in self.schedules
        )

    @property
    def num_copies(self) -> int:
        """Partial pages of the prefix cache that were continued."""
        return sum(len(schedule.copies) for schedule in self.schedules)

    @property
    def most_steps(self) -> int:
        return max(schedule.num_steps for schedule in self.schedules)


class Lab:
    def __init__(self, setting: Setting, oracle: Oracle):
        self.setting, self.oracle = setting, oracle
        self.pages_per_row = -(-MOST_TOKENS // setting.page_size)
        self.num_pages = 1 + MOST_CACHED * self.pages_per_row
        model = oracle.config
        rows = (setting.max_rows,)
        self._buckets = Buckets(
            decode_rows=setting.decode_rows,
            extend_rows=rows,
            extend_tokens=(64, MOST_TOKENS),
            patch_lines=rows,
            copies=rows,
            decode_steps=setting.decode_steps,
            scores=64,
        )
        shape = StateShape(
            max_rows=setting.max_rows,
            pages_per_row=self.pages_per_row,
            max_steps=max(setting.decode_steps),
            max_tokens=MOST_TOKENS,
            num_layers=model.num_layers,
            num_pages=self.num_pages,
            page_size=setting.page_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            dtype=jnp.dtype("float32"),
        )
        self._counter = CompileCounter()
        self._runner = Runner(oracle.graphdef, oracle.params, shape, self._buckets)

    def release(self) -> None:
        self._runner.release()
        self._counter.close()

    def engine(
        self,
        *,
        chunk: int | None = None,
        num_pages: int | None = None,
        num_steps: int | None = None,
        has_cache: bool = True,
        max_rows: int | None = None,
        policy: Policy = "fcfs",
        conservativeness: float = 1.0,  # 0 admits whoever's prompt there is room for
    ) -> EngineCore:
        """None: as much as the runner has, and its first number of decode steps."""
        setting = self.setting
        allocator = PageAllocator(num_pages or self.num_pages)
        scheduler = WatchedScheduler(
            allocator,
            RadixCache(setting.page_size, allocator) if has_cache else None,
            page_size=setting.page_size,
            max_rows=max_rows or setting.max_rows,
            max_prefill_tokens=chunk or setting.most_chunk,
            num_decode_steps=num_steps or setting.decode_steps[0],
            policy=policy,
            conservativeness=conservativeness,
        )
        plan_builder = PlanBuilder(
            self._buckets, max_rows=setting.max_rows, pages_per_row=self.pages_per_row
        )
        info = types.SimpleNamespace(eos_token_ids=self.oracle.config.eos_token_ids)
        log = StepLog(scheduler, 1000, time.monotonic)
        self._engine = EngineCore(
            info, scheduler, plan_builder, self._runner, None, log, self._counter
        )
        return self._engine

    def pick(self, make: Callable[[int], Request]) -> Request:
        """As `Oracle.pick`, asking an engine of its own."""

        def ask(request: Request) -> Answer:
            answer = Answer(request)
            self._run(self.engine(has_cache=False), {request.rid: answer}, [(0, request)], {})
            return answer

        return self.oracle.pick(make, ask)

    def answer(
        self,
        engine: EngineCore,
        requests: list[Request],
        *,
        arrivals: list[int] | None = None,
        aborts: dict[str, int] | None = None,
    ) -> list[Answer]:
        """Runs all to their end, and checks the answers of those that are not aborted.

        Args:
          arrivals: the step before which each arrives; all at once without it.
          aborts: by request id, the step before which it is aborted.
        """
        answers = {request.rid: Answer(request) for request in requests}
        coming = list(zip(arrivals or [0] * len(requests), requests, strict=True))
        self._run(engine, answers, coming, aborts or {})
        for answer in answers.values():
            if answer.finish_reason.type != "abort" or answer.request.rid not in (aborts or {}):
                self.oracle.check(answer)
        return list(answers.values())

    def _run(
        self,
        engine: EngineCore,
        answers: dict[str, Answer],
        coming: list[tuple[int, Request]],
        aborts: dict[str, int],
    ) -> None:
        assert engine is self._engine, "another one has written to its pages"

        def take(outputs: list[StepOutput]) -> None:
            for output in outputs:
                for update in output.updates:
                    answers[update.rid].take(update)

        for step in itertools.count():
            assert step < MOST_STEPS, "nothing gets on"
            for request in [request for when, request in coming if when == step]:
                take(engine.handle(AddRequest(request)))
            for rid in [rid for rid, when in aborts.items() if when == step]:
                take(engine.handle(AbortRequest(rid)))
            output = engine.step()
            take([output] if output else [])
            if not engine.has_work and step >= max(when for when, _ in coming):
                break
        engine.scheduler.check_integrity()

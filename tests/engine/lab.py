"""One compiled engine behind as many schedulers as a test wants.

What costs is to compile. How many tokens a step may take, how many pages there are, whether
prefixes are cached, how many rows run: all that the scheduler decides on the host. So a lab builds
one engine, with more rows, pages and tokens in a step than a test needs, and a test puts another
scheduler in front of its programs. That one finds in its pages what others have left there.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.engine_builder import build_engine
from jaxserve.live_request import Schedule
from jaxserve.messages import AbortRequest, AddRequest, FromEngine, StepNews
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.radix_cache import RadixCache
from jaxserve.request import Request
from jaxserve.scheduler import Policy, Scheduler
from tests.engine.oracle import MOST_TOKENS, Answer, Oracle

MOST_CACHED = 32  # longest texts that the cache holds, so that nothing is evicted unasked
MOST_STEPS = 10_000  # more than any handful of short requests needs


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an engine is compiled for."""

    model: str
    page_size: int
    max_rows: int
    num_steps: int  # decode steps in one dispatch

    @property
    def most_chunk(self) -> int:
        """Prompt tokens in a step; with a decoding token of every row they fill a bucket."""
        return MOST_TOKENS - self.max_rows

    @property
    def pages_per_row(self) -> int:
        return -(-MOST_TOKENS // self.page_size)

    def __str__(self) -> str:
        return f"{self.model}-page{self.page_size}-steps{self.num_steps}"


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
    def __init__(self, setting: Setting, oracle: Oracle, programs_folder: str, **options: Any):
        """`options` are more of `EngineConfig`'s."""
        self.setting, self.oracle = setting, oracle
        config = EngineConfig(
            model_path=oracle.folder,
            skip_tokenizer_init=True,
            dtype="float32",
            context_length=MOST_TOKENS,
            page_size=setting.page_size,
            max_running_requests=setting.max_rows,
            chunked_prefill_size=setting.most_chunk,
            max_total_tokens=MOST_CACHED * MOST_TOKENS,
            num_continuous_decode_steps=setting.num_steps,
            compilation_cache_dir=programs_folder,
        )
        self._core = build_engine(dataclasses.replace(config, **options))

    def release(self) -> None:
        self._core.close()
        self._core.release()

    def limit(
        self,
        *,
        chunk: int | None = None,
        num_pages: int | None = None,
        has_cache: bool = True,
        max_rows: int | None = None,
        policy: Policy = "fcfs",
        conservativeness: float = 1.0,  # 0 admits whoever's prompt there is room for
    ) -> WatchedScheduler:
        """Puts a new scheduler in front of the programs. None: as much as they can do."""
        setting, core = self.setting, self._core
        core.drain()  # of a test that has failed
        allocator = PageAllocator(num_pages or 1 + MOST_CACHED * setting.pages_per_row)
        core.scheduler = WatchedScheduler(
            allocator,
            RadixCache(setting.page_size, allocator) if has_cache else None,
            page_size=setting.page_size,
            max_rows=max_rows or setting.max_rows,
            max_prefill_tokens=chunk or setting.most_chunk,
            num_decode_steps=setting.num_steps,
            policy=policy,
            conservativeness=conservativeness,
        )
        core._plan_builder = PlanBuilder(
            core._plan_builder._buckets,
            max_rows=setting.max_rows,
            pages_per_row=setting.pages_per_row,
        )
        return core.scheduler

    def pick(self, make: Callable[[int], Request]) -> Request:
        """As `Oracle.pick`; asks in front of a scheduler of its own."""

        def ask(request: Request) -> Answer:
            self.limit(has_cache=False)
            answer = Answer(request)
            self._run({request.rid: answer}, [(0, request)], {})
            return answer

        return self.oracle.pick(make, ask)

    def answer(
        self,
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
        answers = self.ask(requests, arrivals=arrivals, aborts=aborts)
        for answer in answers:
            if answer.finish_reason.type != "abort" or answer.request.rid not in (aborts or {}):
                self.oracle.check(answer)
        return answers

    def ask(
        self,
        requests: list[Request],
        *,
        arrivals: list[int] | None = None,
        aborts: dict[str, int] | None = None,
    ) -> list[Answer]:
        """As `answer`, but checks nothing."""
        answers = {request.rid: Answer(request) for request in requests}
        coming = list(zip(arrivals or [0] * len(requests), requests, strict=True))
        self._run(answers, coming, aborts or {})
        return list(answers.values())

    def _run(
        self,
        answers: dict[str, Answer],
        coming: list[tuple[int, Request]],
        aborts: dict[str, int],
    ) -> None:
        core = self._core

        def take(outputs: list[FromEngine]) -> None:
            for output in outputs:
                for update in output.updates:
                    answers[update.rid].take(update)

        for step in itertools.count():
            assert step < MOST_STEPS, "nothing gets on"
            for request in [request for when, request in coming if when == step]:
                take(core.handle(AddRequest(request)))
            for rid in [rid for rid, when in aborts.items() if when == step]:
                take(core.handle(AbortRequest(rid)))
            take([core.step() or StepNews([])])
            if not core.has_work and step >= max(when for when, _ in coming):
                break
        core.scheduler.check_integrity()

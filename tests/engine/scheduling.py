"""A scheduler that runs without a device: every row draws the token that the test names."""

import collections

from jaxserve.live_request import LiveRequest, Schedule
from jaxserve.page_allocator import PageAllocator
from jaxserve.radix_cache import RadixCache
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import RUNNING
from jaxserve.step_result import StepResult
from jaxserve.stop_checker import StopChecker

EOS, TOKEN = 2, 7
ABORTED = FinishReason("abort", message="Aborted")


def make_scheduler(
    *, num_pages=100, page_size=4, max_rows=8, max_prefill_tokens=16, cached=True, **options
) -> Scheduler:
    """`num_pages` counts the trash page."""
    allocator = PageAllocator(num_pages)
    return Scheduler(
        allocator,
        RadixCache(page_size, allocator) if cached else None,
        page_size=page_size,
        max_rows=max_rows,
        max_prefill_tokens=max_prefill_tokens,
        **options,
    )


def add(
    scheduler: Scheduler,
    rid: str,
    prompt: int | list[int],
    max_new_tokens: int = 2,
    *,
    priority: int = 0,
    namespace: str = "",
) -> None:
    """A prompt of so many tokens is nobody else's."""
    if isinstance(prompt, int):
        prompt = [1000 * ord(rid[-1]) + i for i in range(prompt)]
    request = Request(rid, prompt, SamplingParams(), max_new_tokens, 0, priority, namespace)
    scheduler.add(request, StopChecker(request, frozenset({EOS}), tokenizer=None))


def result(drawn: dict[int, list[tuple[int, int]]]) -> StepResult:
    """What a step gives whose rows draw these tokens, one after the other."""
    num_steps = max(map(len, drawn.values()), default=0)
    return StepResult([{row: draws[i] for row, draws in drawn.items()} for i in range(num_steps)])


def draw(schedule: Schedule, token: int = TOKEN, finish: int = RUNNING) -> StepResult:
    """Every row that samples draws `token`."""
    rows = [chunk.live.row for chunk in schedule.chunks]
    return result(dict.fromkeys(rows, [(token, finish)] * schedule.num_steps))


def step(scheduler: Scheduler, token: int = TOKEN) -> tuple[Schedule, list[RequestUpdate]]:
    """Dispatches one step, and reads it at once."""
    schedule = scheduler.schedule()
    scheduler.check_integrity()
    updates = scheduler.update(schedule, draw(schedule, token))
    scheduler.check_integrity()
    return schedule, updates


def run(scheduler: Scheduler, most: int = 200) -> dict[str, RequestUpdate]:
    """Steps until all have ended; returns each one's last update with all of its tokens."""
    output, ends = collections.defaultdict(list), {}
    for _ in range(most):
        if scheduler.is_idle:
            return {rid: with_tokens(end, output[rid]) for rid, end in ends.items()}
        for update in step(scheduler)[1]:
            output[update.rid] += update.token_ids
            if update.finish_reason:
                ends[update.rid] = update
    raise AssertionError("not all have ended")


def with_tokens(update: RequestUpdate, token_ids: list[int]) -> RequestUpdate:
    return RequestUpdate(
        update.rid, token_ids, update.finish_reason, update.cached_tokens, update.num_retractions
    )


def rids(lives: list[LiveRequest]) -> list[str]:
    return [live.request.rid for live in lives]


def layout(schedule: Schedule) -> list[tuple[str, int, int]]:
    """Each chunk's request, how many prompt tokens it has, and how many it samples."""
    return [(c.live.request.rid, len(c.tokens), c.num_samples) for c in schedule.chunks]

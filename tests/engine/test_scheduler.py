"""What a step holds, who waits, who is retracted; then any history on a device that keeps books.

The device executes real step plans as `programs.py` does. In place of keys and values it keeps
which tokens each slot of the cache was written for, and its tokens follow from what it reads:
output that differs from a solo run, or a slot that holds anybody else's tokens, is a bug. That
such a test sees bugs is tested too, by making some.
"""

import collections
import dataclasses
import inspect
import types
from itertools import batched

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from jaxserve import live_request as live_request_module
from jaxserve import scheduler as scheduler_module
from jaxserve.buckets import Buckets
from jaxserve.errors import QueueFull
from jaxserve.live_request import LiveRequest, Schedule
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.radix_cache import RadixCache
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import (
    KEEP,
    LAST_TOKEN,
    NOT_FINITE,
    NUM_STOP_IDS,
    OUT_OF_LENGTH,
    PATCH_HEADER,
    RUNNING,
    SAMPLING_START,
    STOPPED,
    StepPlan,
    ints,
)
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


def draw(schedule: Schedule, token: int = TOKEN, finish: int = RUNNING):
    """Every row that samples draws `token`."""
    rows = [chunk.live.row for chunk in schedule.chunks]
    return dict.fromkeys(rows, [(token, finish)] * schedule.num_steps)


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


# Chunks.


def test_idle_scheduler_has_nothing_to_do():
    assert make_scheduler().schedule() is None and make_scheduler().is_idle


def test_short_prompt_is_computed_in_one_step_and_samples():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    schedule, updates = step(scheduler)
    assert rids(schedule.new_rows) == ["a"] and not schedule.is_decode
    assert layout(schedule) == [("a", 5, 1)] and schedule.num_prompt_tokens == 5
    assert updates == [RequestUpdate("a", [TOKEN])]


def test_decoding_row_has_no_prompt_tokens():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    step(scheduler)
    schedule, updates = step(scheduler)
    assert schedule.is_decode and schedule.new_rows == [] and layout(schedule) == [("a", 0, 1)]
    assert updates == [RequestUpdate("a", [TOKEN], FinishReason("length", length=2))]
    assert scheduler.schedule() is None


def test_long_prompt_takes_several_steps_and_samples_in_the_last():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", list(range(100, 110)))
    schedules, news = zip(*[step(scheduler) for _ in range(3)], strict=True)
    assert [layout(s) for s in schedules] == [[("a", 4, 0)], [("a", 4, 0)], [("a", 2, 1)]]
    assert [token for s in schedules for token in s.chunks[0].tokens] == list(range(100, 110))
    assert news == ([], [], [RequestUpdate("a", [TOKEN])])


def test_prompt_as_long_as_a_chunk_samples_at_once():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 4)
    assert layout(step(scheduler)[0]) == [("a", 4, 1)]


def test_decode_rows_come_first_and_go_on_beside_a_long_prompt():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 2, max_new_tokens=9)
    step(scheduler)
    add(scheduler, "b", 6)
    assert layout(step(scheduler)[0]) == [("a", 0, 1), ("b", 4, 0)]
    assert layout(step(scheduler)[0]) == [("a", 0, 1), ("b", 2, 1)]
    assert layout(step(scheduler)[0]) == [("a", 0, 1), ("b", 0, 1)]


def test_decode_rows_do_not_count_as_prompt_tokens():
    scheduler = make_scheduler(max_prefill_tokens=2)
    for rid in "abcdef":
        add(scheduler, rid, 1, max_new_tokens=9)
    for _ in range(3):
        step(scheduler)
    add(scheduler, "g", 5)
    assert layout(step(scheduler)[0]) == [(rid, 0, 1) for rid in "abcdef"] + [("g", 2, 0)]


def test_prompts_share_a_chunk_in_the_order_of_their_arrival():
    scheduler = make_scheduler(max_prefill_tokens=8)
    for rid, length in [("a", 3), ("b", 7), ("c", 2)]:
        add(scheduler, rid, length)
    assert layout(step(scheduler)[0]) == [("a", 3, 1), ("b", 5, 0)]
    assert layout(step(scheduler)[0]) == [("a", 0, 1), ("b", 2, 1), ("c", 2, 1)]


def test_several_decode_steps_in_a_dispatch_only_without_prompts():
    scheduler = make_scheduler(num_decode_steps=3, max_prefill_tokens=4)
    add(scheduler, "a", 2, max_new_tokens=12)
    assert step(scheduler)[0].num_steps == 1
    schedule, updates = step(scheduler)
    assert schedule.num_steps == 3 and layout(schedule) == [("a", 0, 3)]
    assert updates == [RequestUpdate("a", [TOKEN] * 3)]
    add(scheduler, "b", 6)
    for prompt_tokens, num_samples in [(4, 0), (2, 1)]:
        schedule, _ = step(scheduler)
        assert schedule.num_steps == 1
        assert layout(schedule) == [("a", 0, 1), ("b", prompt_tokens, num_samples)]
    assert step(scheduler)[0].num_steps == 3


def test_of_several_decode_steps_only_those_that_are_wanted_count():
    scheduler = make_scheduler(num_decode_steps=8)
    add(scheduler, "a", 2, max_new_tokens=4), add(scheduler, "b", 2, max_new_tokens=20)
    step(scheduler)
    schedule, updates = step(scheduler)
    assert layout(schedule) == [("a", 0, 3), ("b", 0, 8)]
    assert updates[0] == RequestUpdate("a", [TOKEN] * 3, FinishReason("length", length=4))
    assert updates[1] == RequestUpdate("b", [TOKEN] * 8)


def test_stop_among_several_decode_steps_ends_the_request_there():
    scheduler = make_scheduler(num_decode_steps=4)
    add(scheduler, "a", 2, max_new_tokens=20)
    step(scheduler)
    schedule = scheduler.schedule()
    drawn = [(TOKEN, RUNNING), (EOS, STOPPED), (8, RUNNING), (9, RUNNING)]
    updates = scheduler.update(schedule, {0: drawn})
    assert updates == [RequestUpdate("a", [TOKEN, EOS], FinishReason("stop", matched=EOS))]
    scheduler.check_integrity()


# Steps that are dispatched before the last one is read.


def test_next_step_does_not_wait_for_the_tokens_of_the_last():
    scheduler = make_scheduler()
    add(scheduler, "a", 2, max_new_tokens=3)
    schedules = [scheduler.schedule() for _ in range(3)]
    assert [layout(s) for s in schedules] == [[("a", 2, 1)], [("a", 0, 1)], [("a", 0, 1)]]
    assert scheduler.schedule() is None and not scheduler.is_idle, "all it may sample is in flight"
    news = [scheduler.update(s, draw(s)) for s in schedules]
    assert news[2] == [RequestUpdate("a", [TOKEN], FinishReason("length", length=3))]
    assert scheduler.is_idle


def test_step_dispatched_after_the_last_token_gives_nothing():
    scheduler = make_scheduler()
    add(scheduler, "a", 2, max_new_tokens=9)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.update(first, draw(first, EOS))[0].finish_reason.type == "stop"
    add(scheduler, "b", 3)
    third = scheduler.schedule()
    assert third.chunks[0].live.row == 0, "the row that became free"
    assert scheduler.update(second, draw(second)) == []
    assert scheduler.update(third, draw(third)) == [RequestUpdate("b", [TOKEN])]


# Who is admitted.


def test_admission_waits_for_a_row():
    scheduler = make_scheduler(max_rows=2)
    for rid in "abc":
        add(scheduler, rid, 2)
    assert rids(step(scheduler)[0].new_rows) == ["a", "b"]
    assert rids(step(scheduler)[0].new_rows) == [], "both rows are taken"
    assert rids(step(scheduler)[0].new_rows) == ["c"]


def test_admission_waits_for_the_pages_of_the_prompt():
    scheduler = make_scheduler(num_pages=1 + 3, page_size=4, conservativeness=0.0)
    add(scheduler, "a", 8, max_new_tokens=2), add(scheduler, "b", 5, max_new_tokens=1)
    assert rids(step(scheduler)[0].new_rows) == ["a"]
    assert rids(step(scheduler)[0].new_rows) == []
    assert rids(step(scheduler)[0].new_rows) == ["b"]


def test_admission_waits_for_what_the_running_are_expected_to_need():
    def num_admitted(conservativeness: float) -> int:
        scheduler = make_scheduler(num_pages=1 + 10, conservativeness=conservativeness)
        for rid in "abcd":
            add(scheduler, rid, 4, max_new_tokens=20)
        return len(step(scheduler)[0].new_rows)

    assert [num_admitted(c) for c in (1.5, 1.0, 0.0)] == [1, 2, 4]


def test_request_alone_is_admitted_whatever_is_expected():
    scheduler = make_scheduler(num_pages=1 + 4)
    add(scheduler, "a", 4, max_new_tokens=13)
    assert rids(step(scheduler)[0].new_rows) == ["a"]
    assert len(run(scheduler)) == 1


def test_pages_are_taken_as_they_are_needed_not_at_admission():
    scheduler = make_scheduler(page_size=4)
    add(scheduler, "a", 8, max_new_tokens=90)
    step(scheduler)
    assert scheduler.allocator.num_used == 2
    schedule, _ = step(scheduler)
    assert rids(schedule.changed_rows) == ["a"] and scheduler.allocator.num_used > 2
    assert step(scheduler)[0].changed_rows == []


def test_head_that_waits_is_not_overtaken():
    scheduler = make_scheduler(num_pages=1 + 4, page_size=4)
    add(scheduler, "a", 8, max_new_tokens=1)
    add(scheduler, "long", 16, max_new_tokens=1)
    add(scheduler, "short", 1, max_new_tokens=1)
    assert [rids(step(scheduler)[0].new_rows) for _ in range(3)] == [["a"], ["long"], ["short"]]


def test_higher_priority_goes_first_and_among_equals_who_came_first():
    scheduler = make_scheduler(max_rows=1)
    for rid, priority in [("a", 0), ("b", -1), ("c", 2), ("d", 0), ("e", 2)]:
        add(scheduler, rid, 2, max_new_tokens=1, priority=priority)
    order = [rids(step(scheduler)[0].new_rows) for _ in range(5)]
    assert order == [["c"], ["e"], ["a"], ["d"], ["b"]]


@pytest.mark.parametrize("policy,order", [("fcfs", "bcd"), ("lpm", "dcb")])
def test_lpm_prefers_who_has_most_cached(policy, order):
    scheduler = make_scheduler(max_rows=1, policy=policy)
    add(scheduler, "a", list(range(16)), max_new_tokens=1)
    step(scheduler)
    for rid, shared in [("b", 1), ("c", 6), ("d", 9)]:
        add(scheduler, rid, [*range(shared), 99], max_new_tokens=1)
    assert "".join(rids(step(scheduler)[0].new_rows)[0] for _ in range(3)) == order


def test_lpm_goes_by_priority_first():
    scheduler = make_scheduler(max_rows=1, policy="lpm")
    add(scheduler, "a", list(range(16)), max_new_tokens=1)
    step(scheduler)
    add(scheduler, "b", [*range(9), 99], max_new_tokens=1)
    add(scheduler, "c", [99], max_new_tokens=1, priority=1)
    assert rids(step(scheduler)[0].new_rows) == ["c"]


def test_full_queue_refuses():
    scheduler = make_scheduler(max_rows=1, max_waiting=2)
    add(scheduler, "a", 1), add(scheduler, "b", 1)
    with pytest.raises(QueueFull):
        add(scheduler, "c", 1)
    step(scheduler)
    add(scheduler, "c", 1)
    assert rids(scheduler.waiting) == ["b", "c"] and len(run(scheduler)) == 3


def test_queue_of_no_length_refuses_all():
    with pytest.raises(QueueFull):
        add(make_scheduler(max_waiting=0), "a", 1)


def test_request_that_the_pool_can_never_hold_is_refused():
    scheduler = make_scheduler(num_pages=1 + 4, page_size=4)
    add(scheduler, "fits", 16, max_new_tokens=1)
    with pytest.raises(ValueError, match="large needs more pages than the KV cache has"):
        add(scheduler, "large", 16, max_new_tokens=2)
    assert rids(scheduler.waiting) == ["fits"] and list(run(scheduler)) == ["fits"]


def test_id_that_is_taken_is_refused_until_it_is_free():
    scheduler = make_scheduler()
    add(scheduler, "a", 2, max_new_tokens=1)
    with pytest.raises(ValueError, match="Duplicate request ID detected: a"):
        add(scheduler, "a", 2)
    schedule = scheduler.schedule()
    with pytest.raises(ValueError, match="Duplicate request ID detected: a"):
        add(scheduler, "a", 2)
    scheduler.update(schedule, draw(schedule))
    add(scheduler, "a", 2)
    add(scheduler, "a2", 2)


# What is cached.


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
@pytest.mark.parametrize("shared", [0, 1, 3, 4, 7, 8, 15, 16, 17])
def test_cached_tokens_are_counted_to_the_token(page_size, shared):
    scheduler = make_scheduler(page_size=page_size)
    add(scheduler, "a", list(range(20)), max_new_tokens=1)
    run(scheduler)
    add(scheduler, "b", [*range(shared), 99, 98], max_new_tokens=1)
    schedule, updates = step(scheduler)
    assert updates[0].cached_tokens == schedule.num_cached_tokens == shared
    assert layout(schedule) == [("b", 2, 1)]
    copies = [(c.num_tokens, c.target) for c in schedule.copies]
    partial = shared % page_size
    assert [count for count, _ in copies] == ([partial] if partial else [])


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_one_token_of_a_prompt_is_always_computed(page_size, length):
    scheduler = make_scheduler(page_size=page_size, max_prefill_tokens=64)
    for rid in "ab":
        add(scheduler, rid, list(range(length)), max_new_tokens=1)
        schedule, updates = step(scheduler)
    assert updates[0].cached_tokens == length - 1 and layout(schedule) == [("b", 1, 1)]


def test_without_a_cache_nothing_is_shared():
    scheduler = make_scheduler(cached=False)
    for rid in "ab":
        add(scheduler, rid, list(range(9)), max_new_tokens=1)
        assert run(scheduler)[rid].cached_tokens == 0
    assert scheduler.allocator.num_used == 0 and scheduler.flush()


def test_output_is_cached_but_for_its_last_token():
    scheduler = make_scheduler(page_size=1)
    add(scheduler, "a", list(range(3)), max_new_tokens=4)
    run(scheduler)
    add(scheduler, "b", [0, 1, 2, *([TOKEN] * 4), 9], max_new_tokens=1)
    assert run(scheduler)["b"].cached_tokens == 6


def test_prefix_is_shared_while_its_owner_still_runs():
    scheduler = make_scheduler(page_size=4)
    add(scheduler, "a", list(range(10)), max_new_tokens=50)
    step(scheduler)
    add(scheduler, "b", list(range(10)), max_new_tokens=50)
    schedule, updates = step(scheduler)
    assert layout(schedule) == [("a", 0, 1), ("b", 2, 1)]
    assert updates[1].cached_tokens == 8
    a, b = scheduler.running
    assert a.pages[:2] == b.pages[:2] and not set(a.pages[2:]) & set(b.pages[2:])


def test_prompt_that_is_half_computed_is_not_shared():
    scheduler = make_scheduler(page_size=4, max_prefill_tokens=8)
    for rid in "ab":
        add(scheduler, rid, list(range(12)), max_new_tokens=1)
        schedule, _ = step(scheduler)
    assert schedule.num_cached_tokens == 0
    assert run(scheduler)["b"].cached_tokens == 0


def test_same_prompts_running_together_end_with_the_same_pages():
    scheduler = make_scheduler(page_size=4, max_prefill_tokens=64)
    for rid in "abc":
        add(scheduler, rid, list(range(10)), max_new_tokens=5)
    schedule, _ = step(scheduler)
    assert schedule.num_cached_tokens == 0 and schedule.num_prompt_tokens == 30
    assert len({tuple(live.pages[:2]) for live in scheduler.running}) == 1
    assert scheduler.allocator.num_used == 2 + 3
    assert {"b", "c"} <= set(rids(step(scheduler)[0].changed_rows)), "the device is told"
    assert all(end.finish_reason.length == 5 for end in run(scheduler).values())


def test_namespaces_share_nothing():
    scheduler = make_scheduler()
    for rid, namespace, cached in [("a", "", 0), ("b", "x", 0), ("c", "x", 8), ("d", "", 8)]:
        add(scheduler, rid, list(range(9)), max_new_tokens=1, namespace=namespace)
        assert run(scheduler)[rid].cached_tokens == cached


def test_cache_gives_way_to_new_requests():
    scheduler = make_scheduler(num_pages=1 + 4, page_size=4)
    for rid in "abcdef":
        add(scheduler, rid, 13, max_new_tokens=2)
        assert run(scheduler)[rid].cached_tokens == 0
        assert scheduler.allocator.num_free == 0, "what nobody needs stays cached"


@pytest.mark.parametrize("length", [13, 25, 32])
def test_donor_of_a_partial_page_does_not_keep_its_request_from_running(length):
    scheduler = make_scheduler(num_pages=1 + 8, page_size=4, max_prefill_tokens=64)
    add(scheduler, "a", list(range(32)), max_new_tokens=1)
    run(scheduler)
    add(scheduler, "b", [*range(6), *range(100, 94 + length)], max_new_tokens=1)
    assert scheduler.schedule() is not None, "nobody else is here: it must run"


def test_flush_empties_the_cache_only_when_idle():
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(9)), max_new_tokens=2)
    assert not scheduler.flush(), "one is waiting"
    step(scheduler)
    assert not scheduler.flush(), "one is running"
    run(scheduler)
    assert scheduler.allocator.num_used > 0 and scheduler.flush()
    assert scheduler.allocator.num_used == 0
    add(scheduler, "b", list(range(9)), max_new_tokens=1)
    assert run(scheduler)["b"].cached_tokens == 0


def test_counts_the_tokens_in_rows():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 6, max_new_tokens=5)
    counts = []
    for _ in range(4):
        step(scheduler)
        counts.append(scheduler.num_tokens_in_rows)
    assert counts == [4, 6, 7, 8], "the token sampled last is not in the cache"


# Retraction.


def make_crowd(count: int = 3, *, free: int = 1, priorities=(0, 0, 0)) -> Scheduler:
    """Requests of 3 prompt tokens that want 6 more, in too few pages of one token each."""
    scheduler = make_scheduler(num_pages=1 + 3 * count + free, page_size=1, conservativeness=0.0)
    for rid, priority in zip("abc"[:count], priorities, strict=False):
        add(scheduler, rid, 3, max_new_tokens=6, priority=priority)
    step(scheduler)
    assert len(scheduler.running) == count
    return scheduler


def test_youngest_is_retracted():
    scheduler = make_crowd()
    schedule, _ = step(scheduler)
    assert rids(scheduler.running) == ["a", "b"] and rids(scheduler.waiting) == ["c"]
    assert layout(schedule) == [("a", 0, 1), ("b", 0, 1)] and scheduler.num_retractions == 1


def test_lower_priority_is_retracted_before_the_younger():
    scheduler = make_crowd(priorities=(0, -1, 0))
    step(scheduler)
    assert rids(scheduler.waiting) == ["b"]


def test_oldest_is_never_retracted_and_all_end():
    scheduler = make_crowd(free=3)
    ends = run(scheduler)
    assert {rid: len(end.token_ids) + 1 for rid, end in ends.items()} == dict.fromkeys("abc", 6)
    assert ends["a"].num_retractions == 0 and ends["c"].num_retractions > 0
    assert list(ends) == ["a", "b", "c"]


def test_retracted_request_keeps_its_output_and_computes_it_again():
    scheduler = make_crowd(count=2, free=2)
    while not scheduler.waiting:
        step(scheduler)
    (b,) = scheduler.waiting
    assert b.num_output == 2 and b.row == -1
    while scheduler.waiting:
        schedule, _ = step(scheduler)
    chunk = schedule.chunks[-1]
    computed = b.request.prompt_ids + [TOKEN] * 2
    assert chunk.live is b and chunk.tokens == computed[b.num_matched :]
    end = run(scheduler)["b"]
    assert end.finish_reason == FinishReason("length", length=6) and end.num_retractions == 1
    assert end.cached_tokens == 0, "what was cached when it was first admitted"


def test_retracted_request_goes_before_those_who_came_later():
    scheduler = make_crowd()
    add(scheduler, "d", 1, max_new_tokens=1)
    step(scheduler)
    assert rids(sorted(scheduler.waiting, key=lambda live: live.order)) == ["c", "d"]
    admitted = []
    while not scheduler.is_idle:
        admitted += rids(step(scheduler)[0].new_rows)
    assert admitted.index("c") < admitted.index("d")


def test_tokens_in_flight_of_a_retracted_request_are_dropped():
    scheduler = make_crowd(count=2, free=2)
    old, new = scheduler.schedule(), scheduler.schedule()
    assert layout(old) == [("a", 0, 1), ("b", 0, 1)] and layout(new) == [("a", 0, 1)]
    updates = scheduler.update(old, {0: [(8, RUNNING)], 1: [(9, RUNNING)]})
    assert updates == [RequestUpdate("a", [8])]
    (b,) = scheduler.waiting
    assert b.tokens == [*b.request.prompt_ids, TOKEN]
    scheduler.update(new, draw(new))
    assert run(scheduler)["b"].finish_reason == FinishReason("length", length=6)


# Ends.


def test_finished_request_gives_back_its_row_and_leaves_its_pages_to_the_cache():
    scheduler = make_scheduler(max_rows=2)
    add(scheduler, "a", 10, max_new_tokens=1)
    _, updates = step(scheduler)
    assert updates[0].finish_reason == FinishReason("length", length=1)
    assert scheduler.cache.evictable_pages == scheduler.allocator.num_used == 3
    assert not scheduler.running
    for rid in "bc":
        add(scheduler, rid, 1)
    assert rids(step(scheduler)[0].new_rows) == ["b", "c"]


def test_stop_token_ends_the_request_and_is_reported():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    _, updates = step(scheduler, EOS)
    assert updates == [RequestUpdate("a", [EOS], FinishReason("stop", matched=EOS))]
    assert not scheduler.running


def test_no_new_tokens_computes_the_prompt_and_gives_none():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", list(range(6)), max_new_tokens=0)
    assert step(scheduler)[1] == []
    assert step(scheduler, EOS)[1] == [RequestUpdate("a", [], FinishReason("length", length=0))]
    assert scheduler.schedule() is None
    add(scheduler, "b", list(range(7)), max_new_tokens=0)
    assert run(scheduler)["b"].cached_tokens == 6, "a way to fill the cache"


NOT_FINITE_REASON = FinishReason(
    "abort",
    message="the model's scores are not finite",
    status_code=500,
    err_type="InternalServerError",
)


@pytest.mark.parametrize("max_new_tokens", [0, 1, 5])
def test_row_whose_scores_are_not_finite_ends_with_500(max_new_tokens):
    scheduler = make_scheduler()
    add(scheduler, "bad", 3, max_new_tokens)
    add(scheduler, "good", 3, max_new_tokens=5)
    schedule = scheduler.schedule()
    bad, good = (chunk.live.row for chunk in schedule.chunks)
    updates = scheduler.update(schedule, {bad: [(0, NOT_FINITE)], good: [(TOKEN, RUNNING)]})
    assert updates == [RequestUpdate("bad", [], NOT_FINITE_REASON), RequestUpdate("good", [TOKEN])]
    scheduler.check_integrity()
    assert rids(scheduler.running) == ["good"]


@pytest.mark.parametrize("length,num_good", [(3, 0), (3, 4), (9, 0), (9, 4)])
def test_nothing_that_is_not_finite_is_cached(length, num_good):
    """A whole page of it neither: whoever asked the same again would fail for as long."""
    scheduler = make_scheduler(page_size=4)
    add(scheduler, "bad", list(range(length)), max_new_tokens=9)
    for _ in range(num_good):
        step(scheduler)
    schedule = scheduler.schedule()
    (update,) = scheduler.update(schedule, draw(schedule, 0, NOT_FINITE))
    assert update.finish_reason == NOT_FINITE_REASON
    scheduler.check_integrity()
    add(scheduler, "again", [*range(length), *[TOKEN] * num_good, 9], max_new_tokens=1)
    most = length // 4 * 4 if num_good else 0  # of a prompt whose first scores were finite
    assert run(scheduler)["again"].cached_tokens <= most


def test_scores_that_are_not_finite_among_several_steps_end_it_there():
    scheduler = make_scheduler(num_decode_steps=3)
    add(scheduler, "a", 3, max_new_tokens=9)
    step(scheduler)
    schedule = scheduler.schedule()
    drawn = [(TOKEN, RUNNING), (0, NOT_FINITE), (5, RUNNING)]
    assert scheduler.update(schedule, {0: drawn}) == [
        RequestUpdate("a", [TOKEN], NOT_FINITE_REASON)
    ]


def test_abort_of_a_waiting_request():
    scheduler = make_scheduler(max_rows=1)
    for rid in "abc":
        add(scheduler, rid, 2, max_new_tokens=1)
    update = scheduler.abort("b")
    assert update == RequestUpdate("b", [], FinishReason("abort", message="Abort in waiting queue"))
    assert rids(step(scheduler)[0].new_rows) == ["a"]
    assert rids(step(scheduler)[0].new_rows) == ["c"]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_abort_of_a_running_request_gives_back_its_pages(num_steps, cached):
    scheduler = make_scheduler(max_prefill_tokens=4, cached=cached)
    add(scheduler, "a", 10, max_new_tokens=9)
    for _ in range(num_steps):
        step(scheduler)
    assert scheduler.abort("a") == RequestUpdate("a", [], ABORTED)
    scheduler.check_integrity()
    assert scheduler.schedule() is None and scheduler.flush()
    assert scheduler.allocator.num_used == 0


def test_abort_of_a_retracted_request():
    scheduler = make_crowd()
    step(scheduler)
    update = scheduler.abort("c")
    assert update.finish_reason.message == "Abort in waiting queue" and update.num_retractions == 1
    assert set(run(scheduler)) == {"a", "b"}


def test_half_computed_prompt_of_an_aborted_request_is_cached():
    scheduler = make_scheduler(page_size=4, max_prefill_tokens=6)
    add(scheduler, "a", list(range(20)))
    step(scheduler)
    scheduler.abort("a")
    add(scheduler, "b", list(range(20)), max_new_tokens=1)
    assert run(scheduler)["b"].cached_tokens == 6


def test_abort_of_an_unknown_request_does_nothing():
    scheduler = make_scheduler()
    add(scheduler, "job-10", 2, max_new_tokens=1)
    assert scheduler.abort("job-1") is None
    step(scheduler)
    assert scheduler.abort("job-10") is None, "it has finished"


def test_abort_while_a_step_runs_drops_that_steps_token():
    scheduler = make_scheduler()
    for rid in "ab":
        add(scheduler, rid, 2)
    schedule = scheduler.schedule()
    sampled = draw(schedule)
    assert scheduler.abort("a") == RequestUpdate("a", [], ABORTED)
    add(scheduler, "a", [50, 51, 52])
    assert scheduler.update(schedule, sampled) == [RequestUpdate("b", [TOKEN])]
    assert layout(step(scheduler)[0]) == [("b", 0, 1), ("a", 3, 1)], "another request"


def test_news_of_a_step_are_not_given_to_another_request_of_the_same_id():
    scheduler = make_scheduler()
    add(scheduler, "a", 2)
    old = scheduler.schedule()
    sampled = draw(old)
    scheduler.abort("a")
    add(scheduler, "a", [50, 51, 52])
    new = scheduler.schedule()
    assert rids(new.new_rows) == ["a"]
    assert scheduler.update(old, sampled) == []
    assert scheduler.update(new, draw(new, 9)) == [RequestUpdate("a", [9])]


def test_after_a_failed_step_everybody_is_computed_anew():
    scheduler = make_scheduler(max_prefill_tokens=4, page_size=2)
    for rid in "abc":
        add(scheduler, rid, 3, max_new_tokens=5)
    for _ in range(3):
        step(scheduler)
    lost = scheduler.schedule()
    scheduler.retract_all()
    scheduler.check_integrity()
    assert scheduler.allocator.num_used == 0 and not scheduler.running
    assert all(chunk.is_stale for chunk in lost.chunks)
    schedule, _ = step(scheduler)
    assert rids(schedule.new_rows)[0] == "a" and schedule.num_cached_tokens == 0
    ends = run(scheduler)
    assert {rid: end.finish_reason.length for rid, end in ends.items()} == dict.fromkeys("abc", 5)


# Any history, on a device that keeps books.

NAMESPACES = ("", "other")
BASES = ([100, 101, 102] * 30, [101, 100, 100, 102] * 20)  # prompts share their beginnings
FILLER_STOPS = tuple(range(900, 900 + NUM_STOP_IDS))  # leave the device no place for EOS


def extend_chain(chain: list[int], token: int, namespace: str) -> None:
    """One more token, as all that came before it make it out: keys and values."""
    before = chain[-1] if chain else NAMESPACES.index(namespace)
    chain.append(hash((before, token)))


def chain_of(tokens: list[int], namespace: str) -> list[int]:
    chain: list[int] = []
    for token in tokens:
        extend_chain(chain, token, namespace)
    return chain


def next_token(seen: int) -> int | None:
    """What follows a token; None where the scores are not finite."""
    if seen % 53 == 0:
        return None
    return EOS if seen % 11 == 0 else 100 + seen % 3


def solo(request: Request) -> tuple[list[int], str]:
    """The output of a request that is alone, and the type of its end."""
    chain, output = chain_of(request.prompt_ids, request.namespace), []
    while True:
        token = next_token(chain[-1])
        if token is None:
            return output, "abort"
        if request.max_new_tokens == 0:
            return output, "length"
        output.append(token)
        if token == EOS:
            return output, "stop"
        if len(output) == request.max_new_tokens:
            return output, "length"
        extend_chain(chain, token, request.namespace)


@dataclasses.dataclass
class Row:
    """What the device knows of a row; `chain` is what it must find in the row's pages."""

    chain: list[int] = dataclasses.field(default_factory=list)
    namespace: str = ""
    last_token: int = -1
    finish: int = STOPPED
    limit: int = 0
    stop_ids: tuple[int, ...] = ()
    pages: list[int] = dataclasses.field(default_factory=list)


class Device:
    """Executes step plans, each at once: whatever the host learns later, the order is this one."""

    def __init__(self, page_size: int, max_rows: int, pages_per_row: int, num_steps: int):
        self.page_size, self.max_rows, self.num_steps = page_size, max_rows, num_steps
        self.width = PATCH_HEADER + pages_per_row
        self.reset()

    def reset(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}  # page, slot: position, what
        self.rows = [Row() for _ in range(self.max_rows + 1)]
        self.batch = [self.max_rows] * self.max_rows
        self.out = [[(-1, -1)] * (self.max_rows + 1) for _ in range(self.num_steps)]

    def dispatch(self, plan: StepPlan, new_rows: list[LiveRequest]) -> list[list[tuple[int, int]]]:
        if plan.patch:
            self.patch(ints(plan.patch), {live.row: live for live in new_rows})
        self.copy(ints(plan.copies).reshape(-1, 3).tolist())
        if plan.kind == "extend":
            self.extend(plan)
        else:
            rows = self.batch[: plan.num_rows]
            for step in range(plan.num_steps):
                running = [row for row in rows if self.rows[row].finish == RUNNING]
                self.compute({row: [LAST_TOKEN] for row in running})
                self.sample(running, step)
        return [list(rows) for rows in self.out]

    def patch(self, packed: np.ndarray, new_rows: dict[int, LiveRequest]) -> None:
        lines = packed[: -self.max_rows].reshape(-1, self.width)
        self.batch = packed[-self.max_rows :].tolist()
        for line in lines.tolist():
            index, seq_len, last_token, finish, limit = line[:5]
            row = self.rows[index]
            if index == self.max_rows:
                assert finish == STOPPED and not any(line[PATCH_HEADER:])
                continue
            if live := new_rows.get(index):
                assert seq_len < len(live.tokens), "one token at least is left to compute"
                row.namespace = live.request.namespace
                row.chain = chain_of(live.tokens[:seq_len], row.namespace)
            else:
                assert seq_len == KEEP
            row.last_token = row.last_token if last_token == KEEP else last_token
            row.finish = row.finish if finish == KEEP else finish
            row.limit, row.stop_ids = limit, tuple(line[5:SAMPLING_START])
            row.pages = line[PATCH_HEADER:]

    def copy(self, copies: list[list[int]]) -> None:
        """All are read before any is written."""
        moved = {
            (target, i): self.slots.get((source, i)) if i < kept else None
            for source, target, kept in copies
            for i in range(self.page_size)
        }
        for slot, content in moved.items():
            self.slots.pop(slot, None)
            if content is not None:
                self.slots[slot] = content

    def extend(self, plan: StepPlan) -> None:
        rows, lengths, samples, tokens = np.split(
            ints(plan.forward), np.arange(1, 4) * plan.num_rows
        )
        work, sampling, start = {}, [], 0
        for row, length, samples_one in np.stack([rows, lengths, samples], axis=1).tolist():
            if row < self.max_rows and self.rows[row].finish == RUNNING:
                assert row not in work
                work[row] = tokens[start : start + length].tolist()
                sampling += [row] * samples_one
            start += length
        self.compute(work)
        self.sample(sampling, 0)

    def compute(self, work: dict[int, list[int]]) -> None:
        """Writes the tokens of all rows, then reads all that each row sees."""
        for index, tokens in work.items():
            row = self.rows[index]
            for token in tokens:
                token = row.last_token if token == LAST_TOKEN else token
                position = len(row.chain)
                extend_chain(row.chain, token, row.namespace)
                page = row.pages[position // self.page_size]
                assert page > 0, "a page that the device was not told of"
                self.slots[page, position % self.page_size] = position, row.chain[-1]
        for index in work:
            row = self.rows[index]
            for position, expected in enumerate(row.chain):
                page = row.pages[position // self.page_size]
                found = self.slots.get((page, position % self.page_size))
                assert found == (position, expected), "attention reads what is not its own"

    def sample(self, rows: list[int], step: int) -> None:
        for index in rows:
            row = self.rows[index]
            token = next_token(row.chain[-1])
            if token is None:
                row.finish = NOT_FINITE
            elif token in row.stop_ids:
                row.finish = STOPPED
            elif len(row.chain) >= row.limit:
                row.finish = OUT_OF_LENGTH
            row.last_token = -5 if token is None else token
            self.out[step][index] = row.last_token, row.finish


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
        self.ended: dict[str, FinishReason] = {}
        self.aborted: set[str] = set()

    # What happens.

    def submit(self, prompt: list[int], max_new_tokens: int, priority: int, kind: int) -> None:
        """`kind` chooses a namespace, and whether the device knows the stop token."""
        rid = "job" + len(self.requests) * "0"  # each the beginning of all that follow
        stops = FILLER_STOPS if kind & 2 else ()
        sampling = SamplingParams(stop_token_ids=stops)
        namespace = NAMESPACES[kind & 1]
        request = Request(rid, prompt, sampling, max_new_tokens, 0, priority, namespace)
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
        sampled = {
            chunk.live.row: [step[chunk.live.row] for step in out[: schedule.num_steps]]
            for chunk in schedule.chunks
            if not chunk.is_stale
        }
        for update in self.scheduler.update(schedule, sampled):
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
        if reason is None:
            return
        self.ended[rid] = reason
        if reason.type == "abort" and reason.status_code is None:
            assert rid in self.aborted
        else:
            assert self.output[rid] == tokens and reason.type == end

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


TestAnyHistory = SchedulerMachine.TestCase
TestAnyHistory.settings = settings(
    max_examples=300,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# Bugs that the history above must find.

BUGS = {
    "result of an earlier stay in a row is taken": ("live.epoch += 1", "pass"),
    "no result is stale": ("return self.live.epoch != self.epoch", "return False"),
    "retraction drops the output": (
        "live.num_retractions += 1",
        "del live.tokens[len(live.request.prompt_ids) :]",
    ),
    "retraction forgets the tokens in flight": (
        "live.num_computed = live.num_inflight = live.prefill_len = 0",
        "live.num_computed = live.prefill_len = 0",
    ),
    "retracted goes to the back of the queue": (
        "self.waiting.insert(0, live)",
        "live.arrival = next(self._arrivals); self.waiting.append(live)",
    ),
    "the oldest is retracted": ("self._retract(max(", "self._retract(min("),
    "who arrived last goes first": (
        "self.waiting.sort(key=lambda live: live.order)",
        "self.waiting.sort(key=lambda live: live.order, reverse=True)",
    ),
    "pages leak when a row is left": ("self.allocator.free(live.pages[num_kept:])", "pass"),
    "pages are freed twice": (
        "self.allocator.free(live.pages[num_kept:])",
        "self.allocator.free(live.pages[max(num_kept - 1, 0) :])",
    ),
    "lock leaks": (
        "self.cache.unlock(live.node)\n        live.row",
        "pass\n        live.row",
    ),
    "match is not locked": ("self.cache.lock(match.node)", "match.node.lock_count += 0"),
    "partial page is not copied": ("if copy.num_tokens:", "if False:"),
    "whole prompt is matched": ("most=len(live.tokens) - 1", "most=len(live.tokens)"),
    "namespace is ignored by lookups": (
        "live.tokens, namespace=live.request.namespace, most",
        "live.tokens, most",
    ),
    "namespace is ignored by what is kept": (
        "live.pages[:num_kept],\n                namespace=live.request.namespace,",
        "live.pages[:num_kept],",
    ),
    "last sampled token counts as computed": ("len(self.tokens) - 1))", "len(self.tokens)))"),
    "tokens in flight count as known": (
        "return min(self.num_computed, max(self.prefill_len, len(self.tokens) - 1))",
        "return self.num_computed",
    ),
    "device is not told of new pages": ("changed_rows=changed", "changed_rows=[]"),
    "duplicate pages stay in use": ("live.pages[:num_full] = shared.pages", "pass"),
    "own pages count as shared": (
        "live.node, live.num_shared = shared.node, num_full",
        "live.node, live.num_shared = shared.node, len(live.pages)",
    ),
    "admitted without pages": (
        "fresh = self.allocator.allocate(missing)",
        "fresh = self.allocator.allocate(missing) or []",
        "<= self._num_available:",
        "< 10**9:",
    ),
    "pages for one decode step of several": ("min(self._num_decode_steps, live.num_left)", "1"),
    "more decode steps than tokens are left": (
        "count = min(num_steps, live.num_left)",
        "count = num_steps",
    ),
    "chunk beyond its budget": ("budget -= len(tokens)", "budget -= 1"),
    "failed step leaves the cache": (
        "self._retract(live, keep=False)\n        if self.cache is not None:",
        "self._retract(live, keep=False)\n        if False:",
    ),
    "flush beside a request": (
        "if self._by_rid:\n            return False",
        "if self.running:\n            return False",
    ),
}


def with_bug(*pieces: str) -> type[Scheduler]:
    """The scheduler, with pieces of its source replaced: old, new, old, new, ..."""
    sources = [inspect.getsource(module) for module in (live_request_module, scheduler_module)]
    for old, new in batched(pieces, 2):
        assert sum(source.count(old) for source in sources) == 1, "the source has changed"
        sources = [source.replace(old, new) for source in sources]
    lives, mutant = types.ModuleType("lives"), types.ModuleType("mutant")
    exec(sources[0], lives.__dict__)
    exec(sources[1], mutant.__dict__)
    for name in ("Chunk", "LiveRequest", "PageCopy", "Schedule"):
        setattr(mutant, name, getattr(lives, name))
    return mutant.Scheduler


def run_histories(scheduler: type[Scheduler], count: int) -> None:
    class Machine(SchedulerMachine):
        scheduler_type = scheduler

    run_state_machine_as_test(
        Machine,
        settings=settings(
            TestAnyHistory.settings,
            max_examples=count,
            phases=[Phase.generate],
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
        ),
    )


def test_no_bug_is_found_where_there_is_none():
    run_histories(with_bug("budget -= len(tokens)", "budget -= len(tokens)"), 20)


@pytest.mark.parametrize("bug", BUGS)
def test_history_finds(bug):
    with pytest.raises(Exception) as found:
        run_histories(with_bug(*BUGS[bug]), 200)
    assert not isinstance(found.value, SyntaxError | NameError), "no bug, but no program"

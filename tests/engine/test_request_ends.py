"""How requests end: by their tokens, by scores that are not finite, by an abort."""

import pytest

from jaxserve.request import FinishReason, RequestUpdate
from jaxserve.step_plan import NOT_FINITE, RUNNING
from tests.engine.scheduling import (
    ABORTED,
    EOS,
    TOKEN,
    add,
    draw,
    layout,
    make_scheduler,
    result,
    rids,
    run,
    step,
)


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
    updates = scheduler.update(schedule, result({bad: [(0, NOT_FINITE)], good: [(TOKEN, RUNNING)]}))
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
    assert scheduler.update(schedule, result({0: drawn})) == [
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

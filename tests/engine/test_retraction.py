"""Who gives way when pages run out or a step fails, and that nothing is lost of it."""

from jaxserve.request import FinishReason, RequestUpdate
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import RUNNING
from tests.engine.scheduling import (
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
    updates = scheduler.update(old, result({0: [(8, RUNNING)], 1: [(9, RUNNING)]}))
    assert updates == [RequestUpdate("a", [8])]
    (b,) = scheduler.waiting
    assert b.tokens == [*b.request.prompt_ids, TOKEN]
    scheduler.update(new, draw(new))
    assert run(scheduler)["b"].finish_reason == FinishReason("length", length=6)


def test_abort_of_a_retracted_request():
    scheduler = make_crowd()
    step(scheduler)
    update = scheduler.abort("c")
    assert update.finish_reason.message == "Abort in waiting queue" and update.num_retractions == 1
    assert set(run(scheduler)) == {"a", "b"}


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

"""What the scheduler does when the weights change under it."""

import pytest

from jaxserve.errors import QueueFull
from tests.engine.scheduling import add, make_scheduler, rids, run, step

SHARED = list(range(10))


def cached(scheduler, rid: str, prompt: list[int] = SHARED) -> int:
    add(scheduler, rid, prompt, max_new_tokens=1)
    return run(scheduler)[rid].cached_tokens


def test_held_requests_wait_until_they_are_released():
    scheduler = make_scheduler()
    add(scheduler, "a", 5, max_new_tokens=3)
    add(scheduler, "b", 5, max_new_tokens=3)
    step(scheduler)
    scheduler.hold()
    add(scheduler, "c", 5, max_new_tokens=3)
    assert not scheduler.is_quiet and not scheduler.is_idle
    while not scheduler.is_quiet:
        step(scheduler)
    assert scheduler.schedule() is None and rids(scheduler.held) == ["c"]
    assert not scheduler.is_idle and not scheduler.flush()
    scheduler.release()
    assert not scheduler.is_quiet and run(scheduler).keys() == {"c"}


def test_retracted_request_is_not_held():
    scheduler = make_scheduler()
    add(scheduler, "a", 5, max_new_tokens=3)
    step(scheduler)
    scheduler.hold()
    scheduler.retract_all()
    assert run(scheduler)["a"].num_retractions == 1


def test_held_requests_count_as_waiting_and_can_be_aborted():
    scheduler = make_scheduler(max_waiting=2)
    scheduler.hold()
    add(scheduler, "a", 5)
    add(scheduler, "b", 5)
    with pytest.raises(QueueFull):
        add(scheduler, "c", 5)
    assert scheduler.abort("a").finish_reason.message == "Abort in waiting queue"
    scheduler.check_integrity()
    (update,) = scheduler.abort_all()
    assert update.rid == "b" and scheduler.is_idle


def test_abort_all_ends_everybody_with_one_reason():
    scheduler = make_scheduler(max_rows=1)
    for rid in "abc":
        add(scheduler, rid, 5, max_new_tokens=9)
    step(scheduler)
    ends = {update.rid: update.finish_reason for update in scheduler.abort_all()}
    assert [ends[rid].message for rid in "abc"] == ["Aborted"] + ["Abort in waiting queue"] * 2
    scheduler.check_integrity()
    assert scheduler.is_idle and scheduler.abort_all() == []


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_what_other_weights_have_computed_is_not_matched(page_size):
    scheduler = make_scheduler(page_size=page_size)
    assert cached(scheduler, "a") == 0 and cached(scheduler, "b") == 9
    scheduler.change_weights()
    scheduler.check_integrity()
    assert scheduler.cache.total_pages == scheduler.allocator.num_used == 0
    assert cached(scheduler, "c") == 0 and cached(scheduler, "d") == 9


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_request_of_two_versions_leaves_nothing_to_the_cache(page_size, steps):
    """It goes on with the pages that it shares, which are freed when it ends."""
    scheduler = make_scheduler(page_size=page_size)
    cached(scheduler, "a")
    for rid in "bc":
        add(scheduler, rid, [*SHARED, ord(rid)], max_new_tokens=8)
    for _ in range(steps):
        step(scheduler)
    scheduler.change_weights()
    scheduler.check_integrity()
    pages = [list(live.pages) for live in scheduler.running]
    step(scheduler)
    assert all(live.pages[: len(p)] == p for live, p in zip(scheduler.running, pages, strict=True))
    assert cached(scheduler, "d") == 0, "not even while they run"
    scheduler.check_integrity()
    assert cached(scheduler, "e") == 9
    assert cached(scheduler, "f", [*SHARED, ord("b"), 7, 7, 7]) == 10
    assert scheduler.flush() and scheduler.allocator.num_used == 0


def test_prompt_of_two_versions_is_not_shared():
    prompt = list(range(30))
    scheduler = make_scheduler(max_prefill_tokens=16)
    add(scheduler, "a", prompt, max_new_tokens=9)
    step(scheduler)
    scheduler.change_weights()
    step(scheduler)
    assert not scheduler.running[0].num_shared and scheduler.cache.total_pages == 0
    run(scheduler)
    assert cached(scheduler, "b", prompt) == 0


def test_request_in_a_row_of_which_nothing_is_computed_is_of_the_new_version_only():
    scheduler = make_scheduler(max_prefill_tokens=16)
    add(scheduler, "a", 16, max_new_tokens=9)
    add(scheduler, "b", SHARED, max_new_tokens=2)
    step(scheduler)
    assert rids(scheduler.running) == ["a", "b"]
    scheduler.change_weights()
    run(scheduler)
    assert cached(scheduler, "c") == 9


def test_request_of_two_versions_that_is_retracted_begins_anew_with_one():
    scheduler = make_scheduler()
    add(scheduler, "a", SHARED, max_new_tokens=8)
    step(scheduler)
    scheduler.change_weights()
    scheduler.retract_all(keep=True)
    assert scheduler.cache.total_pages == 0
    assert run(scheduler)["a"].num_retractions == 1
    assert cached(scheduler, "b") == 9


def test_request_that_has_no_row_yet_is_of_the_new_version_only():
    scheduler = make_scheduler(max_rows=1)
    add(scheduler, "a", 5, max_new_tokens=9)
    add(scheduler, "b", SHARED, max_new_tokens=2)
    step(scheduler)
    scheduler.change_weights()
    run(scheduler)
    assert cached(scheduler, "c") == 9


def test_weights_may_change_again_and_again_under_a_request():
    scheduler = make_scheduler(page_size=4)
    cached(scheduler, "a")
    add(scheduler, "b", [*SHARED, 1], max_new_tokens=20)
    for _ in range(5):
        step(scheduler)
        scheduler.change_weights()
        scheduler.check_integrity()
    run(scheduler)
    assert scheduler.allocator.num_used == 0

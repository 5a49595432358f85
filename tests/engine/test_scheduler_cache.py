"""What a request finds in the prefix cache, and what it leaves there."""

import time

import pytest

from tests.engine.scheduling import TOKEN, add, layout, make_scheduler, rids, run, step


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


def test_samples_of_a_prompt_wait_for_its_first_computation():
    scheduler = make_scheduler(page_size=4, max_prefill_tokens=64, least_shared=8)
    prompt = list(range(21))
    for rid in "abc":
        add(scheduler, rid, prompt, max_new_tokens=2)
    add(scheduler, "d", 5, max_new_tokens=2)
    schedule, _ = step(scheduler)
    assert layout(schedule) == [("a", 21, 1), ("d", 5, 1)], "nobody else is kept waiting"
    schedule, updates = step(scheduler)
    assert layout(schedule) == [("a", 0, 1), ("d", 0, 1), ("b", 1, 1), ("c", 1, 1)]
    assert {update.rid: update.cached_tokens for update in updates}["c"] == 20
    print(f"{schedule.num_cached_tokens} tokens were not computed again")


def test_long_prompts_are_compared_once():
    """However many samples wait for one, and however many steps it takes."""
    scheduler = make_scheduler(
        num_pages=1000, page_size=16, max_rows=64, max_prefill_tokens=500, least_shared=32
    )
    prompt = list(range(10_000))
    for rid in map(str, range(64)):
        add(scheduler, rid, list(prompt), max_new_tokens=1)
    step(scheduler)
    began = time.perf_counter()
    for _ in range(10):
        assert step(scheduler)[0].num_prompt_tokens == 500
    seconds = (time.perf_counter() - began) / 10
    matches = []
    scheduler.cache.match_prefix = lambda *_, **__: matches.append(1)
    step(scheduler)
    print(f"{seconds * 1e3:.2f} ms a step, with all checks of the test")
    assert not matches and len(scheduler.waiting) == 63


@pytest.mark.parametrize(
    "why,shared,namespace",
    [("too few", 7, ""), ("less than half", 9, ""), ("of another namespace", 20, "other")],
)
def test_nobody_waits_for_tokens_that_do_not_help(why, shared, namespace):
    scheduler = make_scheduler(page_size=1, max_prefill_tokens=64, least_shared=8)
    add(scheduler, "a", list(range(21)))
    add(scheduler, "b", [*range(shared), *range(100, 121 - shared)], namespace=namespace)
    assert len(step(scheduler)[0].new_rows) == 2, why


def test_who_waits_for_a_prompt_goes_on_when_its_owner_leaves():
    scheduler = make_scheduler(page_size=4, max_prefill_tokens=8, least_shared=8)
    for rid in "ab":
        add(scheduler, rid, list(range(21)))
    assert rids(step(scheduler)[0].new_rows) == ["a"]
    scheduler.abort("a")
    assert rids(step(scheduler)[0].new_rows) == ["b"]

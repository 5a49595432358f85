"""What a step holds, who is admitted and in which order."""

import pytest

from jaxserve.errors import QueueFull
from jaxserve.request import FinishReason, RequestUpdate
from jaxserve.step_plan import RUNNING, STOPPED
from tests.engine.scheduling import (
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
    updates = scheduler.update(schedule, result({0: drawn}))
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

"""Prompts that may not be cut, as an encoder's: each in one step, none left behind."""

import pytest

from jaxserve.live_request import Schedule
from tests.engine.scheduling import add, draw, make_scheduler

BUDGET = 16


def run(lengths: list[int], *, may_chunk: bool) -> list[list[tuple[str, int]]]:
    """Which requests get how many tokens in each step; one arrives more at each."""
    scheduler = make_scheduler(
        page_size=BUDGET, max_rows=4, max_prefill_tokens=BUDGET, cached=False, may_chunk=may_chunk
    )
    arriving, steps = list(enumerate(lengths)), []
    for i, length in arriving[:4]:
        add(scheduler, f"{i}", length, max_new_tokens=0)
    del arriving[:4]
    while not scheduler.is_idle:
        schedule = scheduler.schedule()
        assert isinstance(schedule, Schedule)
        steps.append([(chunk.live.request.rid, len(chunk.tokens)) for chunk in schedule.chunks])
        scheduler.update(schedule, draw(schedule))
        scheduler.check_integrity()
        if arriving:
            i, length = arriving.pop(0)
            add(scheduler, f"{i}", length, max_new_tokens=0)
    return steps


@pytest.mark.parametrize("lengths", [[10, 10, 6, 16], [9, 9, 9, 9, 9], [16, 1, 16, 1, 16, 2, 2]])
def test_each_prompt_is_in_one_step(lengths):
    steps = run(lengths, may_chunk=False)
    print(steps)
    computed = sorted(step for chunks in steps for step in chunks)
    assert computed == sorted((f"{i}", length) for i, length in enumerate(lengths))
    assert max(sum(count for _, count in chunks) for chunks in steps) <= BUDGET
    cut = [step for chunks in run(lengths, may_chunk=True) for step in chunks]
    assert len(cut) > len(lengths) or lengths == [16, 1, 16, 1, 16, 2, 2]


def test_smaller_ones_fill_a_step_but_keep_no_one_waiting():
    lengths = [9, 16, 3, 3] + [3] * 12
    steps = run(lengths, may_chunk=False)
    print(steps)
    assert steps[0] == [("0", 9), ("2", 3), ("3", 3)]
    assert steps[1] == [("1", 16)], "the one left out has the whole next step"

"""A schedule, packed as the device wants it: what unpacks is what was scheduled."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.buckets import Buckets
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Schedule, Scheduler
from jaxserve.step_plan import (
    KEEP,
    LAST_TOKEN,
    NUM_SAMPLING,
    PATCH_HEADER,
    StepPlan,
    pack_patch_row,
    pack_sampling,
)
from jaxserve.stop_checker import StopChecker

MAX_ROWS, PAGE_SIZE, PAGES_PER_ROW, MAX_PREFILL = 6, 4, 10, 12
GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.9)


class Engine:
    """A scheduler and a plan builder, without a device."""

    def __init__(self):
        self.scheduler = Scheduler(
            PageAllocator(1 + MAX_ROWS * PAGES_PER_ROW),
            page_size=PAGE_SIZE,
            max_rows=MAX_ROWS,
            max_prefill_tokens=MAX_PREFILL,
        )
        buckets = Buckets.make(MAX_ROWS, MAX_PREFILL, growth=2)
        self.builder = PlanBuilder(buckets, max_rows=MAX_ROWS, pages_per_row=PAGES_PER_ROW)

    def add(self, rid: str, prompt_length: int, sampling=GREEDY, seed=0, max_new_tokens=9) -> None:
        prompt = list(range(100, 100 + prompt_length))
        request = Request(rid, prompt, sampling, max_new_tokens, seed)
        self.scheduler.add(request, StopChecker(request, frozenset(), tokenizer=None))

    def step(self) -> tuple[Schedule, StepPlan]:
        schedule = self.scheduler.schedule()
        plan = self.builder.build(schedule)
        self.scheduler.update(schedule, dict.fromkeys(range(MAX_ROWS), 5))
        return schedule, plan


def unpack(plan: StepPlan) -> tuple[list[int], list[int], list[int]]:
    """Rows, query lengths and tokens of the forward."""
    rows, lengths, tokens = np.split(plan.forward_array(), [plan.num_rows, 2 * plan.num_rows])
    assert len(tokens) == plan.num_tokens and len(plan.sample_rows_array()) == plan.num_rows
    return rows.tolist(), lengths.tolist(), tokens.tolist()


def test_prompts_are_packed_and_padded_to_the_trash_row():
    engine = Engine()
    engine.add("a", 3), engine.add("b", 2)
    _, plan = engine.step()
    assert (plan.num_tokens, plan.num_rows) == (16, 4)
    rows, lengths, tokens = unpack(plan)
    assert rows == [0, 1, MAX_ROWS, MAX_ROWS] and lengths == [3, 2, 0, 0]
    assert tokens == [100, 101, 102, 100, 101] + [0] * 11


def test_decoding_rows_ask_for_their_last_token():
    engine = Engine()
    for rid in "abc":
        engine.add(rid, 2)
    engine.step()
    _, plan = engine.step()
    assert (plan.num_tokens, plan.num_rows) == (4, 4)
    assert unpack(plan) == ([0, 1, 2, MAX_ROWS], [1, 1, 1, 0], [LAST_TOKEN] * 3 + [0])
    assert plan.sample_rows_array().tolist() == [0, 1, 2, MAX_ROWS]


def test_row_in_the_middle_of_its_prompt_does_not_sample():
    engine = Engine()
    engine.add("a", 1)
    engine.step()
    engine.add("b", MAX_PREFILL + 1)
    _, plan = engine.step()
    assert unpack(plan)[0][:2] == [0, 1]
    assert plan.sample_rows_array().tolist() == [0, MAX_ROWS, MAX_ROWS, MAX_ROWS]
    _, plan = engine.step()
    assert plan.sample_rows_array().tolist()[:2] == [0, 1]


def test_admitted_requests_rewrite_their_rows():
    engine = Engine()
    engine.add("a", 6, SAMPLED, seed=3), engine.add("b", 1)
    schedule, plan = engine.step()
    lines = plan.patch_array(PAGES_PER_ROW)
    assert lines.shape == (4, PATCH_HEADER + PAGES_PER_ROW)
    for line, running in zip(lines, schedule.admitted, strict=False):
        assert line[:3].tolist() == [running.row, 0, KEEP]
        np.testing.assert_array_equal(line[3:PATCH_HEADER], pack_sampling(running.request))
        pages = line[PATCH_HEADER:].tolist()
        assert pages == running.pages + [0] * (PAGES_PER_ROW - len(running.pages))


def test_padding_of_a_patch_rewrites_the_trash_row_with_zeros():
    engine = Engine()
    engine.add("a", 6)
    lines = engine.step()[1].patch_array(PAGES_PER_ROW)
    assert lines[1:, 0].tolist() == [MAX_ROWS] * 3
    assert not lines[1:, 1:].any()


def test_step_without_admissions_has_no_patch():
    engine = Engine()
    engine.add("a", 6)
    engine.step()
    assert engine.step()[1].patch_array(PAGES_PER_ROW) is None


def test_sampler_is_greedy_only_where_every_row_is():
    engine = Engine()
    engine.add("a", 2, GREEDY), engine.add("b", 2, SamplingParams(top_k=1))
    assert engine.step()[1].sampler == "greedy"
    engine.add("c", 2, SAMPLED, max_new_tokens=1)
    assert engine.step()[1].sampler == "plain"
    assert engine.step()[1].sampler == "greedy"


def test_steps_are_numbered():
    engine = Engine()
    engine.add("a", 2)
    assert [engine.step()[1].step for _ in range(3)] == [0, 1, 2]


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=10),
    st.integers(1, 12),
)
def test_plan_unpacks_to_the_schedule(requests, num_steps):
    engine = Engine()
    for i, (prompt_length, max_new_tokens) in enumerate(requests):
        engine.add(f"r{i}", prompt_length, max_new_tokens=max_new_tokens)
    for _ in range(num_steps):
        if not (engine.scheduler.running or engine.scheduler.waiting):
            break
        schedule, plan = engine.step()
        rows, lengths, tokens = unpack(plan)
        start = 0
        for i, chunk in enumerate(schedule.chunks):
            assert rows[i] == chunk.running.row
            assert tokens[start : start + lengths[i]] == (chunk.tokens or [LAST_TOKEN])
            assert (plan.sample_rows_array()[i] == chunk.running.row) == chunk.samples
            start += lengths[i]
        padding = slice(len(schedule.chunks), None)
        assert set(rows[padding]) | set(plan.sample_rows_array()[padding].tolist()) <= {MAX_ROWS}
        assert not any(lengths[padding]) and not any(tokens[start:])


@given(
    st.builds(
        StepPlan,
        step=st.integers(0, 2**63 - 1),
        num_tokens=st.integers(0, 2**31 - 1),
        num_rows=st.integers(0, 2**31 - 1),
        sampler=st.sampled_from(["greedy", "plain"]),
        forward=st.binary(max_size=64),
        sample_rows=st.binary(max_size=64),
        patch=st.binary(max_size=64),
    )
)
def test_plan_survives_msgpack(plan):
    sent = msgspec.msgpack.encode(plan)
    assert msgspec.msgpack.decode(sent, type=StepPlan) == plan


def test_arrays_of_a_plan_are_its_own_copies():
    engine = Engine()
    engine.add("a", 3)
    _, plan = engine.step()
    plan.forward_array()[:] = 9
    plan.patch_array(PAGES_PER_ROW)[:] = 9
    assert unpack(plan)[1] == [3, 0, 0, 0]


def sampling_of(seed=0, **fields) -> np.ndarray:
    return pack_sampling(Request("r", [1], SamplingParams(**fields), 1, seed))


def test_sampling_packs_floats_as_bits():
    packed = sampling_of(temperature=0.7, top_p=0.3, top_k=40)
    assert packed.dtype == np.int32 and packed.shape == (NUM_SAMPLING,)
    assert packed[:2].view(np.float32).tolist() == [np.float32(0.7), np.float32(0.3)]
    assert packed[2] == 40 and not packed[5:].any()


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 5e-7}, {"top_k": 1}])
def test_greedy_sampling_is_packed_as_temperature_zero(fields):
    assert sampling_of(**fields)[:1].view(np.float32) == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -(2**63)])
def test_all_64_bits_of_the_seed_are_packed(seed):
    low, high = sampling_of(seed)[3:5].view(np.uint32).tolist()
    assert low + (high << 32) == seed % 2**64


def test_patch_row_of_a_full_page_table():
    pages = list(range(1, PAGES_PER_ROW + 1))
    line = pack_patch_row(2, 7, np.arange(8), pages, PATCH_HEADER + PAGES_PER_ROW)
    assert line.tolist() == [2, 7, KEEP, *range(8), *pages] and line.dtype == np.int32

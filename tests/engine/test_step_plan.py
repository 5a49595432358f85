"""A schedule, packed as the device wants it: what unpacks is what was scheduled."""

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.buckets import Buckets, smallest
from jaxserve.live_request import LiveRequest, Schedule
from jaxserve.page_allocator import PageAllocator
from jaxserve.plan_builder import PlanBuilder
from jaxserve.radix_cache import RadixCache
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import (
    KEEP,
    LAST_TOKEN,
    NUM_SAMPLING,
    NUM_STOP_IDS,
    PATCH_HEADER,
    RUNNING,
    SAMPLERS,
    SAMPLING_START,
    STOPPED,
    StepPlan,
    ints,
    pack_sampling,
)
from jaxserve.stop_checker import StopChecker
from tests.engine.scheduling import result

MAX_ROWS, PAGE_SIZE, PAGES_PER_ROW, MAX_PREFILL = 6, 4, 10, 12
TRASH, WIDTH = MAX_ROWS, PATCH_HEADER + PAGES_PER_ROW
BUCKETS = Buckets.make(MAX_ROWS, MAX_PREFILL, growth=2)
GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.9)


class Engine:
    """A scheduler and a plan builder, without a device: every row draws token 5."""

    def __init__(self, num_decode_steps: int = 1):
        allocator = PageAllocator(1 + MAX_ROWS * PAGES_PER_ROW)
        self.scheduler = Scheduler(
            allocator,
            RadixCache(PAGE_SIZE, allocator),
            page_size=PAGE_SIZE,
            max_rows=MAX_ROWS,
            max_prefill_tokens=MAX_PREFILL,
            num_decode_steps=num_decode_steps,
        )
        self.builder = PlanBuilder(BUCKETS, max_rows=MAX_ROWS, pages_per_row=PAGES_PER_ROW)

    def add(
        self,
        rid: str,
        prompt: int | list[int],
        sampling=GREEDY,
        seed=0,
        max_new_tokens=9,
        eos=frozenset(),
    ) -> None:
        if isinstance(prompt, int):
            prompt = [1000 * ord(rid[-1]) + i for i in range(prompt)]
        request = Request(rid, prompt, sampling, max_new_tokens, seed)
        self.scheduler.add(request, StopChecker(request, eos, tokenizer=None))

    def step(self) -> tuple[Schedule, StepPlan]:
        schedule = self.scheduler.schedule()
        plan = self.builder.build(schedule)
        drawn = [(5, RUNNING)] * schedule.num_steps
        self.scheduler.update(schedule, result(dict.fromkeys(range(MAX_ROWS), drawn)))
        return schedule, plan


@dataclasses.dataclass
class Forward:
    """A plan's forward, unpacked."""

    rows: list[int]
    lengths: list[int]
    samples: list[int]
    tokens: list[int]

    @classmethod
    def of(cls, plan: StepPlan) -> "Forward":
        parts = np.split(ints(plan.forward), np.arange(1, 4) * plan.num_rows)
        assert len(parts[3]) == plan.num_tokens
        return cls(*(part.tolist() for part in parts))


def patch_of(plan: StepPlan) -> tuple[np.ndarray, list[int]]:
    """Its lines, and the batch."""
    packed = ints(plan.patch)
    return packed[:-MAX_ROWS].reshape(-1, WIDTH), packed[-MAX_ROWS:].tolist()


def check_static(line: np.ndarray, live: LiveRequest) -> None:
    """The part of a line that the device always takes over."""
    request = live.request
    assert line[0] == live.row
    assert line[4] == len(request.prompt_ids) + request.max_new_tokens - 1
    np.testing.assert_array_equal(line[SAMPLING_START:PATCH_HEADER], pack_sampling(request))
    pages = line[PATCH_HEADER:].tolist()
    assert pages == live.pages + [0] * (PAGES_PER_ROW - len(live.pages))


def test_prompts_are_packed_and_padded_to_the_trash_row():
    engine = Engine()
    engine.add("a", [1, 2, 3]), engine.add("b", [4, 5])
    _, plan = engine.step()
    assert (plan.kind, plan.num_tokens, plan.num_rows, plan.num_steps) == ("extend", 16, 4, 1)
    assert Forward.of(plan) == Forward(
        [0, 1, TRASH, TRASH], [3, 2, 0, 0], [1, 1, 0, 0], [1, 2, 3, 4, 5] + [0] * 11
    )


@pytest.mark.parametrize("num_steps", [1, 3])
def test_decode_step_is_a_batch_of_rows(num_steps):
    engine = Engine(num_steps)
    for rid in "abc":
        engine.add(rid, 2)
    engine.step()
    schedule, plan = engine.step()
    assert (plan.kind, plan.num_rows, plan.num_steps) == ("decode", 4, num_steps)
    assert plan.forward == b"" and schedule.num_steps == num_steps
    assert patch_of(plan)[1] == [0, 1, 2, TRASH, TRASH, TRASH]


def test_decoding_rows_beside_a_prompt_ask_for_their_last_token():
    engine = Engine(num_decode_steps=3)
    engine.add("a", 2), engine.add("b", 2)
    engine.step()
    engine.add("c", [7, 8, 9])
    _, plan = engine.step()
    forward = Forward.of(plan)
    assert (plan.kind, plan.num_steps) == ("extend", 1)
    assert (forward.rows, forward.lengths) == ([0, 1, 2, TRASH], [1, 1, 3, 0])
    assert forward.tokens[:5] == [LAST_TOKEN, LAST_TOKEN, 7, 8, 9]
    assert forward.samples == [1, 1, 1, 0]


def test_row_in_the_middle_of_its_prompt_does_not_sample():
    engine = Engine()
    engine.add("a", 1)
    engine.step()
    engine.add("b", MAX_PREFILL + 1)
    first, second = (Forward.of(engine.step()[1]) for _ in range(2))
    assert first.rows[:2] == second.rows[:2] == [0, 1]
    assert (first.samples[:2], second.samples[:2]) == ([1, 0], [1, 1])


def test_admitted_requests_rewrite_their_rows():
    engine = Engine()
    engine.add("a", 6, SAMPLED, seed=3), engine.add("b", 1)
    schedule, plan = engine.step()
    lines, _ = patch_of(plan)
    assert lines.shape == (4, WIDTH) and len(schedule.new_rows) == 2
    for line, live in zip(lines, schedule.new_rows, strict=False):
        check_static(line, live)
        assert line[1:4].tolist() == [0, KEEP, RUNNING]


def test_admitted_request_starts_behind_what_was_cached():
    engine = Engine()
    engine.add("a", list(range(7)), max_new_tokens=1)
    engine.step()
    engine.add("b", [*range(6), 50, 51])
    schedule, plan = engine.step()
    assert patch_of(plan)[0][0, 1] == 6 and schedule.num_cached_tokens == 6
    assert Forward.of(plan).tokens[:2] == [50, 51]


def test_row_with_more_pages_keeps_what_the_device_knows_better():
    engine = Engine()
    engine.add("a", 4)
    engine.step()
    schedule, plan = engine.step()
    assert schedule.new_rows == [] and len(schedule.changed_rows) == 1
    line = patch_of(plan)[0][0]
    check_static(line, schedule.changed_rows[0])
    assert line[1:4].tolist() == [KEEP, KEEP, KEEP]


def test_stop_ids_are_packed_as_far_as_they_fit():
    engine = Engine()
    engine.add("a", 1, eos=frozenset({2}))
    engine.add("b", 1, SamplingParams(stop_token_ids=tuple(range(10, 20))), eos=frozenset({2}))
    engine.add("c", 1, SamplingParams(ignore_eos=True), eos=frozenset({2}))
    stop_ids = patch_of(engine.step()[1])[0][:3, 5:SAMPLING_START].tolist()
    assert stop_ids[0] == [2] + [-1] * (NUM_STOP_IDS - 1)
    assert stop_ids[1] == list(range(10, 18)) and stop_ids[2] == [-1] * NUM_STOP_IDS


def test_padding_of_a_patch_stops_the_trash_row():
    engine = Engine()
    engine.add("a", 6)
    for line in patch_of(engine.step()[1])[0][1:]:
        assert line[:5].tolist() == [TRASH, 0, 0, STOPPED, 0]
        assert (line[5:SAMPLING_START] == -1).all() and not line[SAMPLING_START:].any()


def test_step_that_changes_nothing_has_no_patch():
    engine = Engine()
    engine.add("a", 5)
    patches = [bool(engine.step()[1].patch) for _ in range(5)]
    assert patches == [True, True, False, False, True], "a new row, a new batch; then a page"


def test_batch_is_sent_when_it_changes_only():
    engine = Engine()
    engine.add("a", 1, max_new_tokens=9), engine.add("b", 1, max_new_tokens=4)
    engine.step()
    assert patch_of(engine.step()[1])[1][:3] == [0, 1, TRASH]
    assert [engine.step()[1].patch for _ in range(2)] == [b"", b""]
    assert patch_of(engine.step()[1])[1] == [0] + [TRASH] * 5, "b has finished"


def test_patch_of_an_extend_step_repeats_the_batch():
    engine = Engine()
    engine.add("a", 2), engine.add("b", 2)
    engine.step(), engine.step()
    engine.add("c", 2)
    _, plan = engine.step()
    assert plan.kind == "extend" and patch_of(plan)[1][:3] == [0, 1, TRASH]


def test_after_a_reset_the_batch_is_sent_again():
    engine = Engine()
    engine.add("a", 1)
    engine.step(), engine.step()
    assert engine.step()[1].patch == b""
    engine.builder.reset()
    assert patch_of(engine.step()[1])[1][:2] == [0, TRASH]


def test_copies_are_padded_with_copies_of_nothing():
    engine = Engine()
    engine.add("a", list(range(7)), max_new_tokens=1)
    assert engine.step()[1].copies == b""
    engine.add("b", [*range(6), 50])
    schedule, plan = engine.step()
    (copy,) = schedule.copies
    assert copy.num_tokens == 2 and copy.target == schedule.new_rows[0].pages[1]
    assert ints(plan.copies).reshape(-1, 3).tolist() == [
        [copy.source, copy.target, 2],
        *([[0, 0, 0]] * 3),
    ]


def test_sampler_is_greedy_only_where_every_row_is():
    engine = Engine()
    engine.add("a", 2, GREEDY), engine.add("b", 2, SamplingParams(top_k=1))
    assert engine.step()[1].sampler == "greedy"
    engine.add("c", 2, SAMPLED, max_new_tokens=1)
    assert engine.step()[1].sampler == "full", "top_p"
    assert engine.step()[1].sampler == "greedy"


def test_steps_are_numbered():
    engine = Engine()
    engine.add("a", 2)
    assert [engine.step()[1].step for _ in range(3)] == [0, 1, 2]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=10),
    st.integers(1, 12),
    st.sampled_from([1, 3]),
)
def test_plan_unpacks_to_the_schedule(requests, num_steps, num_decode_steps):
    engine, batch = Engine(num_decode_steps), [TRASH] * MAX_ROWS
    for i, (prompt_length, max_new_tokens) in enumerate(requests):
        prompt = [*range(prompt_length - 1), 100 + i]
        engine.add(f"r{i}", prompt, max_new_tokens=max_new_tokens)
    for _ in range(num_steps):
        if engine.scheduler.is_idle:
            break
        schedule = engine.scheduler.schedule()
        plan = engine.builder.build(schedule)
        if plan.patch:
            lines, batch = patch_of(plan)
            changed = [*schedule.new_rows, *schedule.changed_rows]
            assert len(lines) == smallest(BUCKETS.patch_lines, len(changed))
            for line, live in zip(lines, changed, strict=False):
                check_static(line, live)
            assert (lines[len(changed) :, 0] == TRASH).all()
        rows = [chunk.live.row for chunk in schedule.chunks]
        if plan.kind == "decode":
            assert plan.num_rows == smallest(BUCKETS.decode_rows, len(rows))
            assert batch == rows + [TRASH] * (MAX_ROWS - len(rows))
        else:
            check_forward(schedule, plan)
        copies = ints(plan.copies).reshape(-1, 3).tolist()
        assert copies[: len(schedule.copies)] == [
            [copy.source, copy.target, copy.num_tokens] for copy in schedule.copies
        ]
        assert not any(map(any, copies[len(schedule.copies) :]))
        drawn = [(5, RUNNING)] * schedule.num_steps
        engine.scheduler.update(schedule, result(dict.fromkeys(rows, drawn)))


def check_forward(schedule: Schedule, plan: StepPlan) -> None:
    assert (plan.num_tokens, plan.num_rows) in BUCKETS.extend_shapes()
    forward, start = Forward.of(plan), 0
    for i, chunk in enumerate(schedule.chunks):
        tokens = chunk.tokens or [LAST_TOKEN]
        assert (forward.rows[i], forward.lengths[i]) == (chunk.live.row, len(tokens))
        assert forward.tokens[start : start + len(tokens)] == tokens
        assert forward.samples[i] == (chunk.num_samples > 0)
        start += len(tokens)
    padding = slice(len(schedule.chunks), None)
    assert set(forward.rows[padding]) <= {TRASH} and not any(forward.tokens[start:])
    assert not any(forward.lengths[padding]) and not any(forward.samples[padding])


@given(
    st.builds(
        StepPlan,
        step=st.integers(0, 2**63 - 1),
        kind=st.sampled_from(["extend", "decode"]),
        num_tokens=st.integers(0, 2**31 - 1),
        num_rows=st.integers(0, 2**31 - 1),
        num_steps=st.integers(1, 64),
        sampler=st.sampled_from(SAMPLERS),
        forward=st.binary(max_size=64),
        patch=st.binary(max_size=64),
        extras=st.binary(max_size=64),
        counts=st.binary(max_size=64),
        copies=st.binary(max_size=64),
        scores=st.binary(max_size=64),
        wants_tops=st.booleans(),
    )
)
def test_plan_survives_msgpack(plan):
    sent = msgspec.msgpack.encode(plan)
    assert msgspec.msgpack.decode(sent, type=StepPlan) == plan


def test_arrays_of_a_plan_are_copies():
    engine = Engine()
    engine.add("a", 3)
    _, plan = engine.step()
    ints(plan.forward)[:] = 9
    assert Forward.of(plan).lengths == [3, 0, 0, 0]


def sampling_of(seed=0, **fields) -> np.ndarray:
    return pack_sampling(Request("r", [1], SamplingParams(**fields), 1, seed))


def test_sampling_packs_floats_as_bits():
    packed = sampling_of(temperature=0.7, top_p=0.3, top_k=40)
    assert packed.dtype == np.int32 and packed.shape == (NUM_SAMPLING,)
    assert packed[:2].view(np.float32).tolist() == [np.float32(0.7), np.float32(0.3)]
    assert packed[2] == 40


def test_sampling_packs_penalties_and_the_least_length():
    packed = sampling_of(
        min_p=0.1,
        frequency_penalty=-0.5,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        min_new_tokens=1,
    )
    floats = [np.float32(value) for value in (0.1, -0.5, 1.5, 1.25)]
    assert packed[5:9].view(np.float32).tolist() == floats
    assert packed[9:].tolist() == [2, 1], "after a prompt of one token; extras say what is banned"
    assert sampling_of()[9:].tolist() == [1, 0]


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 5e-7}])
def test_greedy_sampling_is_packed_as_temperature_zero(fields):
    assert sampling_of(**fields)[:1].view(np.float32) == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -(2**63)])
def test_all_64_bits_of_the_seed_are_packed(seed):
    low, high = sampling_of(seed)[3:5].view(np.uint32).tolist()
    assert low + (high << 32) == seed % 2**64


def test_page_table_of_a_row_can_be_full():
    engine = Engine()
    engine.add("a", PAGES_PER_ROW * PAGE_SIZE, max_new_tokens=1)
    schedule, plan = engine.step()
    check_static(patch_of(plan)[0][0], schedule.new_rows[0])
    assert len(schedule.new_rows[0].pages) == PAGES_PER_ROW

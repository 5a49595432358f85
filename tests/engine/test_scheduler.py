"""First come, first served; what a step holds; where pages and rows go; and a model of it all."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.page_allocator import PageAllocator
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import RunningRequest, Schedule, Scheduler
from jaxserve.stop_checker import StopChecker

EOS, TOKEN = 2, 7


def make_scheduler(*, num_pages=100, page_size=4, max_rows=8, max_prefill_tokens=16) -> Scheduler:
    return Scheduler(
        PageAllocator(num_pages),
        page_size=page_size,
        max_rows=max_rows,
        max_prefill_tokens=max_prefill_tokens,
    )


def add(scheduler: Scheduler, rid: str, prompt_length: int, max_new_tokens: int = 2) -> None:
    prompt = [100 + i for i in range(prompt_length)]
    request = Request(rid, prompt, SamplingParams(), max_new_tokens, seed=0)
    scheduler.add(request, StopChecker(request, frozenset({EOS}), tokenizer=None))


def step(scheduler: Scheduler, token: int | None = TOKEN) -> tuple[Schedule, list[RequestUpdate]]:
    """One step in which every row that samples draws `token`."""
    schedule = scheduler.schedule()
    rows = [chunk.running.row for chunk in schedule.chunks if chunk.samples]
    updates = scheduler.update(schedule, dict.fromkeys(rows, token))
    scheduler.check_integrity()
    return schedule, updates


def rids(running: list[RunningRequest]) -> list[str]:
    return [r.request.rid for r in running]


def layout(schedule: Schedule) -> list[tuple[str, int, bool]]:
    """Each chunk's request, how many prompt tokens it has, and whether it samples."""
    return [(c.running.request.rid, len(c.tokens), c.samples) for c in schedule.chunks]


def test_idle_scheduler_has_nothing_to_do():
    assert make_scheduler().schedule() is None


def test_short_prompt_is_computed_in_one_step_and_samples():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    schedule, updates = step(scheduler)
    assert rids(schedule.admitted) == ["a"]
    assert layout(schedule) == [("a", 5, True)] and schedule.num_prompt_tokens == 5
    assert updates == [RequestUpdate("a", [TOKEN])]


def test_decoding_row_has_no_prompt_tokens():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    step(scheduler)
    schedule, updates = step(scheduler)
    assert schedule.admitted == [] and layout(schedule) == [("a", 0, True)]
    assert updates == [RequestUpdate("a", [TOKEN], FinishReason("length", length=2))]
    assert scheduler.schedule() is None


def test_long_prompt_takes_several_steps_and_samples_in_the_last():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 10)
    schedules, news = zip(*[step(scheduler) for _ in range(3)], strict=True)
    assert [layout(s) for s in schedules] == [
        [("a", 4, False)],
        [("a", 4, False)],
        [("a", 2, True)],
    ]
    assert [token for s in schedules for token in s.chunks[0].tokens] == list(range(100, 110))
    assert news == ([], [], [RequestUpdate("a", [TOKEN])])


def test_prompt_as_long_as_a_chunk_samples_at_once():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 4)
    assert layout(step(scheduler)[0]) == [("a", 4, True)]


def test_decode_rows_come_first_and_go_on_beside_a_long_prompt():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 2, max_new_tokens=9)
    step(scheduler)
    add(scheduler, "b", 6)
    assert layout(step(scheduler)[0]) == [("a", 0, True), ("b", 4, False)]
    assert layout(step(scheduler)[0]) == [("a", 0, True), ("b", 2, True)]
    assert layout(step(scheduler)[0]) == [("a", 0, True), ("b", 0, True)]


def test_decode_rows_do_not_count_as_prompt_tokens():
    scheduler = make_scheduler(max_prefill_tokens=2)
    for rid in "abcdef":
        add(scheduler, rid, 1, max_new_tokens=9)
    for _ in range(3):
        step(scheduler)
    add(scheduler, "g", 5)
    assert layout(step(scheduler)[0]) == [(rid, 0, True) for rid in "abcdef"] + [("g", 2, False)]


def test_prompts_share_a_chunk_in_the_order_of_their_arrival():
    scheduler = make_scheduler(max_prefill_tokens=8)
    for rid, length in [("a", 3), ("b", 7), ("c", 2)]:
        add(scheduler, rid, length)
    assert layout(step(scheduler)[0]) == [("a", 3, True), ("b", 5, False)]
    assert layout(step(scheduler)[0]) == [("a", 0, True), ("b", 2, True), ("c", 2, True)]


def test_admission_waits_for_a_row():
    scheduler = make_scheduler(max_rows=2)
    for rid in "abc":
        add(scheduler, rid, 2)
    assert rids(step(scheduler)[0].admitted) == ["a", "b"]
    assert rids(step(scheduler)[0].admitted) == [], "both rows are taken"
    assert rids(step(scheduler)[0].admitted) == ["c"]


def test_admission_waits_for_all_pages_that_the_request_can_need():
    scheduler = make_scheduler(num_pages=1 + 5, page_size=4)
    add(scheduler, "a", 8, max_new_tokens=2)  # 9 tokens to store: 3 pages
    add(scheduler, "b", 4, max_new_tokens=6)  # 9 tokens again
    schedule, _ = step(scheduler)
    assert rids(schedule.admitted) == ["a"] and scheduler.allocator.num_used == 3
    step(scheduler)
    assert rids(step(scheduler)[0].admitted) == ["b"]


@pytest.mark.parametrize(
    "prompt_length,max_new_tokens,pages",
    [(4, 0, 1), (4, 1, 1), (4, 2, 2), (1, 4, 1), (1, 5, 2), (5, 0, 2), (3, 14, 4), (3, 15, 5)],
)
def test_pages_are_for_all_tokens_but_the_last(prompt_length, max_new_tokens, pages):
    scheduler = make_scheduler(page_size=4)
    add(scheduler, "a", prompt_length, max_new_tokens)
    scheduler.schedule()
    assert scheduler.allocator.num_used == pages


def test_head_that_waits_is_not_overtaken():
    scheduler = make_scheduler(num_pages=1 + 4, page_size=4)
    add(scheduler, "a", 8, max_new_tokens=1)
    add(scheduler, "long", 16, max_new_tokens=1)
    add(scheduler, "short", 1, max_new_tokens=1)
    assert rids(step(scheduler)[0].admitted) == ["a"]
    assert rids(step(scheduler)[0].admitted) == ["long"]
    assert rids(step(scheduler)[0].admitted) == ["short"]


def test_request_that_the_pool_can_never_hold_is_refused():
    scheduler = make_scheduler(num_pages=1 + 4, page_size=4)
    add(scheduler, "fits", 16, max_new_tokens=1)
    with pytest.raises(ValueError, match="large needs more pages than the KV cache has"):
        add(scheduler, "large", 16, max_new_tokens=2)
    assert [w.request.rid for w in scheduler.waiting] == ["fits"]


def test_id_that_is_taken_is_refused_until_it_is_free():
    scheduler = make_scheduler()
    add(scheduler, "a", 2, max_new_tokens=1)
    with pytest.raises(ValueError, match="Duplicate request ID detected: a"):
        add(scheduler, "a", 2)
    scheduler.schedule()
    with pytest.raises(ValueError, match="Duplicate request ID detected: a"):
        add(scheduler, "a", 2)
    step(scheduler)
    add(scheduler, "a", 2)
    add(scheduler, "a2", 2)


def test_finished_request_gives_back_its_pages_and_its_row():
    scheduler = make_scheduler(max_rows=2)
    add(scheduler, "a", 10, max_new_tokens=1)
    _, updates = step(scheduler)
    assert updates[0].finish_reason == FinishReason("length", length=1)
    assert scheduler.allocator.num_used == 0 and not scheduler.running
    for rid in "bc":
        add(scheduler, rid, 1)
    assert rids(step(scheduler)[0].admitted) == ["b", "c"]


def test_stop_token_ends_the_request_and_is_reported():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    _, updates = step(scheduler, EOS)
    assert updates == [RequestUpdate("a", [EOS], FinishReason("stop", matched=EOS))]
    assert not scheduler.running


def test_no_new_tokens_computes_the_prompt_and_gives_none():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 6, max_new_tokens=0)
    assert step(scheduler)[1] == []
    assert step(scheduler, EOS)[1] == [RequestUpdate("a", [], FinishReason("length", length=0))]
    assert scheduler.schedule() is None and scheduler.allocator.num_used == 0


@pytest.mark.parametrize("max_new_tokens", [0, 1, 5])
def test_row_whose_scores_are_not_finite_ends_with_500(max_new_tokens):
    scheduler = make_scheduler()
    add(scheduler, "bad", 3, max_new_tokens)
    add(scheduler, "good", 3, max_new_tokens=5)
    schedule = scheduler.schedule()
    bad, good = (chunk.running.row for chunk in schedule.chunks)
    updates = scheduler.update(schedule, {bad: None, good: TOKEN})
    reason = FinishReason(
        "abort",
        message="the model's scores are not finite",
        status_code=500,
        err_type="InternalServerError",
    )
    assert updates == [RequestUpdate("bad", [], reason), RequestUpdate("good", [TOKEN])]
    scheduler.check_integrity()
    assert list(scheduler.running) == ["good"]


def test_abort_of_a_waiting_request():
    scheduler = make_scheduler(max_rows=1)
    for rid in "abc":
        add(scheduler, rid, 2, max_new_tokens=1)
    update = scheduler.abort("b")
    assert update == RequestUpdate("b", [], FinishReason("abort", message="Abort in waiting queue"))
    assert rids(step(scheduler)[0].admitted) == ["a"]
    assert rids(step(scheduler)[0].admitted) == ["c"]


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_abort_of_a_running_request_gives_back_its_pages(num_steps):
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 10, max_new_tokens=9)
    for _ in range(num_steps):
        step(scheduler)
    update = scheduler.abort("a")
    assert update == RequestUpdate("a", [], FinishReason("abort", message="Aborted"))
    scheduler.check_integrity()
    assert scheduler.allocator.num_used == 0 and scheduler.schedule() is None


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
    scheduler.abort("a")
    add(scheduler, "a", 3)
    rows = {chunk.running.row: TOKEN for chunk in schedule.chunks}
    assert scheduler.update(schedule, rows) == [RequestUpdate("b", [TOKEN])]
    assert layout(step(scheduler)[0]) == [("b", 0, True), ("a", 3, True)], "another request"


def test_news_of_a_step_are_not_given_to_another_request_of_the_same_id():
    scheduler = make_scheduler()
    add(scheduler, "a", 2)
    old = scheduler.schedule()
    scheduler.abort("a")
    add(scheduler, "a", 3)
    new = scheduler.schedule()
    assert rids(new.admitted) == ["a"]
    assert scheduler.update(old, {old.chunks[0].running.row: TOKEN}) == []
    assert scheduler.update(new, {new.chunks[0].running.row: 9}) == [RequestUpdate("a", [9])]


def test_counts_the_tokens_in_the_cache():
    scheduler = make_scheduler(max_prefill_tokens=4)
    add(scheduler, "a", 6, max_new_tokens=5)
    counts = []
    for _ in range(4):
        step(scheduler)
        counts.append(scheduler.num_cached_tokens)
    assert counts == [4, 6, 7, 8], "the token sampled last is not in the cache"


def name(number: int) -> str:
    """Each a beginning of all that follow, for who confuses one with another."""
    return "job" + number * "0"


class SchedulerMachine(RuleBasedStateMachine):
    """Submits, steps and aborts at random, and keeps its own record of what the cache holds."""

    @initialize(
        num_pages=st.integers(2, 9),
        page_size=st.sampled_from([1, 2, 4, 16]),
        max_rows=st.integers(1, 6),
        max_prefill_tokens=st.integers(1, 7),
    )
    def start(self, num_pages, page_size, max_rows, max_prefill_tokens):
        self.scheduler = make_scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_prefill_tokens=max_prefill_tokens,
        )
        self.page_size, self.max_prefill_tokens = page_size, max_prefill_tokens
        self.room = (num_pages - 1) * page_size  # tokens in the pool
        self.requests: dict[str, Request] = {}
        self.arrived: list[str] = []  # that have not been admitted
        self.output: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.written: dict[int, tuple[str, int]] = {}  # slot of the cache: request, position
        self.length: dict[str, int] = {}  # tokens of a request in the cache

    @rule(prompt_length=st.integers(1, 20), max_new_tokens=st.integers(0, 6))
    def submit(self, prompt_length, max_new_tokens):
        rid = name(len(self.requests))
        if prompt_length + max(max_new_tokens - 1, 0) > self.room:
            with pytest.raises(ValueError, match="needs more pages"):
                add(self.scheduler, rid, prompt_length, max_new_tokens)
            return
        add(self.scheduler, rid, prompt_length, max_new_tokens)
        prompt = [100 + i for i in range(prompt_length)]
        self.requests[rid] = Request(rid, prompt, SamplingParams(), max_new_tokens, seed=0)
        self.output[rid], self.length[rid] = [], 0
        self.arrived.append(rid)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def submit_again(self, data):
        rid = data.draw(st.sampled_from(list(self.requests)))
        if rid not in self.ended:
            with pytest.raises(ValueError, match=f"Duplicate request ID detected: {rid}"):
                add(self.scheduler, rid, 1, 1)

    @rule(number=st.integers(0, 12))
    def abort(self, number):
        rid = name(number)
        update = self.scheduler.abort(rid)
        if rid not in self.requests or rid in self.ended:
            assert update is None
        else:
            assert update.rid == rid and update.finish_reason.type == "abort"
            self.take(update)

    @rule(data=st.data())
    def step(self, data):
        schedule = self.scheduler.schedule()
        if schedule is None:
            assert set(self.requests) == set(self.ended)
            return
        self.check_schedule(schedule)
        for chunk in schedule.chunks:
            self.compute(chunk)
        if data is not None and data.draw(st.booleans(), label="abort while the step runs"):
            self.abort(data.draw(st.integers(0, len(self.requests)), label="job"))
        sampled, token = {}, st.sampled_from([TOKEN, TOKEN, TOKEN, EOS, None])
        for chunk in schedule.chunks:
            if chunk.samples:
                sampled[chunk.running.row] = TOKEN if data is None else data.draw(token)
        rows = {chunk.running.request.rid: chunk.running.row for chunk in schedule.chunks}
        for update in self.scheduler.update(schedule, sampled):
            self.take(update)
            if sampled[rows[update.rid]] is None:
                assert update.finish_reason.status_code == 500 and not update.token_ids
        self.scheduler.check_integrity()

    def check_schedule(self, schedule: Schedule) -> None:
        admitted = rids(schedule.admitted)
        assert admitted == self.arrived[: len(admitted)], "first come, first served"
        del self.arrived[: len(admitted)]
        chunked = [c.running.request.rid for c in schedule.chunks]
        assert len(set(chunked)) == len(chunked)
        assert schedule.num_prompt_tokens <= self.max_prefill_tokens
        prefilling = [c for c in schedule.chunks if c.tokens]
        assert schedule.chunks[len(schedule.chunks) - len(prefilling) :] == prefilling
        decoding = {rid for rid, output in self.output.items() if output} - set(self.ended)
        assert decoding == {c.running.request.rid for c in schedule.chunks if not c.tokens}

    def compute(self, chunk) -> None:
        """Writes the chunk into the record of the cache, then reads all of its request back."""
        request, start = chunk.running.request, self.length[chunk.running.request.rid]
        known = request.prompt_ids + self.output[request.rid]
        count = max(len(chunk.tokens), 1)
        assert (chunk.tokens or [known[-1]]) == known[start : start + count]
        assert chunk.samples == (start + count == len(known))
        slots = [
            page * self.page_size + i for page in chunk.running.pages for i in range(self.page_size)
        ]
        assert min(slots) >= self.page_size, "the trash page"
        for position in range(start, start + count):
            self.written[slots[position]] = (request.rid, position)
        self.length[request.rid] = start + count
        for position in range(start + count):
            assert self.written[slots[position]] == (request.rid, position), "overwritten"

    def take(self, update: RequestUpdate) -> None:
        rid, reason = update.rid, update.finish_reason
        assert rid not in self.ended, "nothing comes after the end"
        self.output[rid] += update.token_ids
        limit = self.requests[rid].max_new_tokens
        assert len(self.output[rid]) <= limit
        if reason is None:
            assert EOS not in update.token_ids and len(self.output[rid]) < limit
            return
        self.ended[rid] = reason
        if reason.type == "length":
            assert len(self.output[rid]) == limit == reason.length
        if rid in self.arrived:
            self.arrived.remove(rid)

    @invariant()
    def integrity(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        running, waiting = set(self.scheduler.running), rids(self.scheduler.waiting)
        assert waiting == self.arrived
        assert len(running) + len(waiting) + len(self.ended) == len(self.requests)
        assert running | set(waiting) == set(self.requests) - set(self.ended)

    def teardown(self):
        """Without new requests all end, one a step at the slowest chunk and token by token."""
        if not hasattr(self, "scheduler"):
            return
        alive = [r for rid, r in self.requests.items() if rid not in self.ended]
        most = sum(len(r.prompt_ids) + r.max_new_tokens + 1 for r in alive)
        for _ in range(most):
            self.step(None)
        assert set(self.ended) == set(self.requests)
        assert self.scheduler.allocator.num_used == 0 and self.scheduler.schedule() is None


TestAnyHistory = SchedulerMachine.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

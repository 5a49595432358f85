"""However a request is served, its tokens are the same and its logprobs within 1e-4, in float32.

Every answer of every test is compared with what the model says when it is run densely over the
whole text (oracle.py); so all that are compared are equal to each other as well. Each test is one
way in which requests may be served differently, and asserts that it did happen. lab.py says why
one compiled runner serves a whole setting; the settings beyond the first few are behind `make
test-equality`.
"""

import collections
import functools
import itertools

import msgspec
import numpy as np
import pytest

from jaxserve.request import Request
from tests.engine.cast import KINDS, make, make_cast, prompt_of
from tests.engine.lab import Lab, Setting
from tests.engine.oracle import Oracle
from tests.golden.cases import CASES
from tests.golden.random_checkpoint import write_checkpoint
from tests.server.serving import DEMO_MODEL, programs_folder

MANY_CHUNKS = (*range(1, 41), 47, 64, 100, 151)
SETTINGS = [
    Setting("qwen3", page_size=4, max_rows=32, num_steps=4),
    Setting("mistral_window", page_size=64, max_rows=4, num_steps=1),
    Setting("qwen3", page_size=1, max_rows=4, num_steps=1),
]
STEPS = itertools.cycle((1, 4, 8))
MORE_SETTINGS = [
    Setting(model, page_size, max_rows=4, num_steps=next(STEPS))
    for model in ("demo", "mistral_window", "qwen3")
    for page_size in (1, 4, 16, 64)
] + [Setting("mistral_window", page_size=16, max_rows=4, num_steps=8)]


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory):
    @functools.cache
    def make_oracle(model: str) -> Oracle:
        if model == "demo":
            return Oracle(DEMO_MODEL)
        case = next(case for case in CASES if case.name == model)
        folder = tmp_path_factory.mktemp(model)
        write_checkpoint(case.config, folder, case.seed, **case.checkpoint_options())
        return Oracle(str(folder))

    return make_oracle


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(setting, id=str(setting)) for setting in SETTINGS),
        *(
            pytest.param(setting, id=f"{setting}-all", marks=pytest.mark.matrix)
            for setting in MORE_SETTINGS
        ),
    ],
)
def lab(request, oracle_of, pytestconfig):
    lab = Lab(request.param, oracle_of(request.param.model), programs_folder(pytestconfig))
    yield lab
    lab.release()


@pytest.fixture(scope="module")
def cast(lab) -> list[Request]:
    return make_cast(32, lab.oracle.config.vocab_size, lab.pick)


def test_alone(lab, cast):
    """The simplest way: no other request, no cache, the prompt in one step."""
    for request in cast:
        scheduler = lab.limit(has_cache=False)
        (answer,) = lab.answer([request])
        assert scheduler.num_chunks(request.rid) == scheduler.most_rows == 1
        assert len(answer.ids) == request.max_new_tokens
    kinds = sorted({request.rid.rpartition("-")[0] for request in cast})
    print(f"{len(cast)} requests of {len(kinds)} kinds: {kinds}")
    assert kinds == sorted(KINDS)


def test_in_a_batch_of_every_size(lab, cast):
    rows = []
    for size in range(1, lab.setting.max_rows + 1):
        scheduler = lab.limit(has_cache=False)
        lab.answer(cast[-size:])
        rows.append(scheduler.most_rows)
    print(f"rows in a step: {rows}")
    assert rows == list(range(1, lab.setting.max_rows + 1))


def test_arriving_while_others_decode(lab, cast):
    for stride in (1, 2, 3):
        scheduler = lab.limit(has_cache=False)
        lab.answer(cast, arrivals=[stride * i for i in range(len(cast))])
        print(f"one request in {stride} steps: {scheduler.num_mixed} mixed steps")
        assert scheduler.num_mixed > len(cast) // 4


def test_in_chunks_of_every_size(lab, cast):
    chosen = [cast[19], cast[6], cast[22]]  # of 150, 40 and 5 tokens
    longest = len(chosen[0].prompt_ids)
    found = []
    for chunk in (*MANY_CHUNKS, lab.setting.most_chunk):
        scheduler = lab.limit(chunk=chunk, has_cache=False)
        lab.answer(chosen)
        found.append(scheduler.num_chunks(chosen[0].rid))
        assert found[-1] == -(-longest // chunk)
    print(f"a prompt of {longest} tokens in {found} chunks")


def test_cached_up_to_every_offset_in_a_page(lab):
    """Somebody has computed the first tokens of the prompt, in its first page or beyond it."""
    page_size, vocab_size = lab.setting.page_size, lab.oracle.config.vocab_size

    def make_take(kind: str, take: int) -> Request:
        prompt = prompt_of(2 * page_size + 19, vocab_size, f"offsets/{kind}/{take}")
        return make(kind, prompt, rid=kind, seed=take, most=4)

    kinds = [kind for kind, (_, told) in KINDS.items() if "start" not in (told or {})]
    requests = [lab.pick(functools.partial(make_take, kind)) for kind in kinds]
    found, copies = [], 0
    for offset in range(page_size // 2, page_size + page_size // 2 + 1):
        request = requests[offset % len(requests)]
        *shared, other = request.prompt_ids[: offset + 1]
        before = make("greedy", [*shared, (other + 1) % vocab_size, 5], rid="before", most=0)
        scheduler = lab.limit()
        lab.answer([before])
        (answer,) = lab.answer([request])
        assert answer.cached_tokens == offset
        found.append(answer.cached_tokens)
        copies += scheduler.num_copies
    print(f"cached {found} of {len(request.prompt_ids)} tokens, {copies} partial pages copied")
    assert {offset % page_size for offset in found} == set(range(page_size))
    assert copies == len([offset for offset in found if offset % page_size])


def test_whole_prompt_is_cached_but_for_its_last_token(lab, cast):
    lab.limit()
    lab.answer(cast)
    cached = [answer.cached_tokens for answer in lab.answer(cast)]
    print(f"cached again: {cached}")
    for request, count in zip(cast, cached, strict=True):
        start = request.logprobs.start if request.logprobs else len(request.prompt_ids)
        assert count == min(start, len(request.prompt_ids) - 1)


def test_output_of_others_is_cached_and_continued(lab, cast):
    """As in a conversation: what was decoded is part of the next prompt."""
    lab.limit(has_cache=False)
    texts = [answer.request.prompt_ids + answer.ids for answer in lab.answer(cast[:16])]

    def make_take(index: int, take: int) -> Request:
        kind = ("greedy_told", "all", "penalties")[index % 3]
        return make(kind, texts[index] + [9 + take, 8], rid=str(index), seed=take, most=6)

    turns = [lab.pick(functools.partial(make_take, index)) for index in range(len(texts))]
    lab.limit()
    lab.answer(cast[:16])
    cached = [answer.cached_tokens for answer in lab.answer(turns)]
    print(f"texts of {list(map(len, texts))} tokens, cached {cached}")
    # All but the last token, which was drawn and never computed.
    assert all(count >= len(text) - 1 for count, text in zip(cached, texts, strict=True))


def test_the_same_prompt_many_times_at_once(lab, cast):
    """Computed side by side, then shared; or found while the first one still decodes."""
    for request, stride in itertools.product(cast[7:10], (0, 1, 3)):
        lab.limit(chunk=24)
        copies = [msgspec.structs.replace(request, rid=f"{i}") for i in range(6)]
        answers = lab.answer(copies, arrivals=[stride * i for i in range(6)])
        cached = [answer.cached_tokens for answer in answers]
        print(f"{len(request.prompt_ids)} tokens, one in {stride} steps: cached {cached}")
        assert {tuple(answer.ids) for answer in answers} == {tuple(answers[0].ids)}


@pytest.mark.parametrize("has_cache", [True, False], ids=["cache", "no cache"])
def test_retracted(lab, has_cache):
    """Too few pages for all; what was computed is computed again, or found in the cache."""

    def make_take(index: int, kind: str, take: int) -> Request:
        key = f"retracted/{index}/{take}"
        prompt = prompt_of(49 + 2 * index, lab.oracle.config.vocab_size, key)
        return make(kind, prompt, rid=kind, seed=take, most=30)

    kinds = ("greedy_told", "hot_told", "penalties", "bias", "all", "greedy")
    requests = [lab.pick(functools.partial(make_take, i, kind)) for i, kind in enumerate(kinds)]
    needed = sum(-(-len(r.prompt_ids) // lab.setting.page_size) for r in requests[:3])
    for chunk in (None, 33):
        lab.limit(num_pages=2 + needed, chunk=chunk, has_cache=has_cache, conservativeness=0.0)
        retractions = {a.request.rid: a.num_retractions for a in lab.answer(requests)}
        print(f"chunks of {chunk}: retractions {retractions}")
        assert retractions["penalties"] > 0, "who has counted its tokens is among them"


def test_several_decode_steps_in_one_dispatch(lab, cast):
    scheduler = lab.limit(has_cache=False)
    lab.answer(cast)
    print(f"{lab.setting.num_steps} steps at once: {len(scheduler.schedules)} dispatches")
    assert scheduler.most_steps == lab.setting.num_steps


def test_stopped_at_every_step_of_a_dispatch(lab, cast):
    """By a stop token; what was decoded beyond it is not told, and harms nobody."""
    lab.limit(has_cache=False)
    alone = lab.answer(cast[:11])
    stopped = [
        lab.pick(functools.partial(stop_at, answer.request, answer.ids, index))
        for index, answer in enumerate(alone)
    ]
    lab.limit()
    answers = lab.answer(stopped)
    lengths = [len(answer.ids) for answer in answers]
    print(f"{lab.setting.num_steps} steps at once: ended after {lengths} tokens")
    assert len(set(lengths)) > 5
    for answer in answers:  # a least length keeps the stop from being drawn before it
        is_bound = answer.request.sampling.min_new_tokens == 0
        assert answer.finish_reason.type == "stop" or not is_bound


def stop_at(request: Request, ids: list[int], index: int, take: int) -> Request:
    """The request with a stop at one of the tokens that it draws."""
    sampling = request.sampling
    index = min(max(index, sampling.min_new_tokens) + take, len(ids) - 1)
    stop = {"ignore_eos": False, "stop_token_ids": (ids[index],)}
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, **stop))


def test_everything_at_once(lab, cast):
    """Any limits, any arrivals, some aborted; each scheduler is asked twice."""
    seen = collections.Counter()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        turns = [rng.choice(len(cast), rng.integers(2, 13), replace=False) for _ in range(2)]
        longest = max(map(num_tokens, (cast[i] for i in np.concatenate(turns))))
        scheduler = lab.limit(**random_limits(rng, lab.setting, longest))
        for chosen in turns:
            requests = [msgspec.structs.replace(cast[i], priority=i % 2) for i in chosen]
            arrivals = rng.integers(0, 15, len(requests)).tolist()
            aborts = {request.rid: int(rng.integers(0, 25)) for request in requests[::5]}
            answers = lab.answer(requests, arrivals=arrivals, aborts=aborts)
            seen["cached tokens"] += sum(answer.cached_tokens for answer in answers)
            seen["aborted"] += sum(answer.finish_reason.type == "abort" for answer in answers)
        seen["retractions"] += scheduler.num_retractions
        seen["copied pages"] += scheduler.num_copies
        seen["mixed steps"] += scheduler.num_mixed
        seen["steps"] += len(scheduler.schedules)
    print(dict(seen))
    assert seen["retractions"] and seen["cached tokens"] and seen["mixed steps"] and seen["aborted"]


def num_tokens(request: Request) -> int:
    return len(request.prompt_ids) + request.max_new_tokens


def random_limits(rng: np.random.Generator, setting: Setting, longest: int) -> dict:
    least = 1 + -(-longest // setting.page_size)  # the trash page, and those of one request
    return {
        "chunk": int(rng.integers(1, 60)) if rng.random() < 0.7 else None,
        "num_pages": int(least * rng.uniform(1, 1.5)) if rng.random() < 0.8 else None,
        "has_cache": bool(rng.random() < 0.8),
        "max_rows": int(rng.integers(1 + setting.max_rows // 2, setting.max_rows + 1)),
        "policy": str(rng.choice(["fcfs", "lpm"])),
        "conservativeness": float(rng.choice([0.0, 0.0, 1.0])),
    }

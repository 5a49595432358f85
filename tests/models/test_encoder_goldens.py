"""Encoders, the whole engine, against transformers: alone, batched, pairs of texts."""

import json
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jaxserve import Engine
from jaxserve.errors import RequestError
from jaxserve.tokenizer import Tokenizer
from tests.golden.pooled.encoders import ENCODER_CASES, EncoderCase
from tests.golden.pooled.golden import Golden, read_golden
from tests.models.test_pooled_goldens import check
from tests.server.serving import programs_folder

LONGEST = 128


@pytest.fixture(scope="module", params=ENCODER_CASES, ids=lambda case: case.name)
def case(request) -> EncoderCase:
    return request.param


@pytest.fixture(scope="module")
def golden(case) -> Golden:
    return read_golden(case.name)


@pytest.fixture(scope="module")
def folder(case, golden, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(case.name)
    assert case.write(folder) == golden.checkpoint, "see tests/golden/README.md"
    return str(folder)


@pytest.fixture(scope="module")
def engine(case, folder, pytestconfig) -> Iterator[Engine]:
    with Engine(
        model_path=folder,
        device="cpu",
        chunked_prefill_size=16,  # to be raised to the longest text
        max_running_requests=4,
        compilation_cache_dir=programs_folder(pytestconfig),
    ) as engine:
        yield engine
    jax.clear_caches()


def prompts_of(case: EncoderCase, golden: Golden) -> dict[str, list]:
    """What `encode` takes."""
    if case.pairs:
        return {"prompt": [list(pair) for pair in case.pairs]}
    return {"input_ids": [prompt.tolist() for prompt in golden.prompts]}


def vectors(answers) -> np.ndarray:
    return np.array([answer["embedding"] for answer in answers], np.float32)


def test_one_at_a_time(case, golden, engine):
    ((name, prompts),) = prompts_of(case, golden).items()
    answers = [engine.encode(**{name: [prompt]})[0] for prompt in prompts]
    lengths = [answer["meta_info"]["prompt_tokens"] for answer in answers]
    assert lengths == list(map(len, golden.prompts))
    check(case, vectors(answers), golden.vectors)


@pytest.fixture
def steps(engine) -> Iterator[list[list[int]]]:
    """Of what follows: how many tokens of each text every step computes."""
    builder, found = engine._core._plan_builder, []
    build = builder.build

    def noting(schedule, **options):
        found.append([len(chunk.tokens) for chunk in schedule.chunks])
        return build(schedule, **options)

    builder.build = noting
    yield found
    del builder.build


def test_batched_and_whole(case, golden, engine, steps):
    ((name, prompts),) = prompts_of(case, golden).items()
    answers = engine.encode(**{name: [*prompts, *prompts[::-1]]})
    print(f"texts in steps: {steps}")
    lengths = [len(prompt) for prompt in golden.prompts] * 2
    assert sorted(sum(steps, [])) == sorted(lengths), "no text is cut"
    assert max(map(len, steps)) > 1 and max(map(sum, steps)) <= LONGEST
    check(case, vectors(answers), np.concatenate([golden.vectors, golden.vectors[::-1]]))
    assert engine.flush_cache(), "every row is free again"


def test_tokens_of_pairs_are_those_of_transformers(case, golden, folder):
    if not case.pairs:
        assert len(golden.prompts[2]) == LONGEST
        return
    tokenizer, vocab = Tokenizer(folder), case.config["vocab_size"]
    for pair, prompt in zip(case.pairs, golden.prompts, strict=True):
        ids, num_first = tokenizer.encode_pair(*pair)
        np.testing.assert_array_equal(ids, prompt % vocab)
        assert num_first == (prompt < vocab).sum()


def test_nothing_is_cached(case, engine):
    assert engine._core._runner._state.kv is None
    assert engine.info.kv_cache_bytes == 0
    names = {key[0] for key in engine._core._runner._programs}
    print(sorted(names))
    assert names - {"accumulate"} == {"extend", "pool", "patch", "peek"}
    assert ("accumulate" in names) == (case.mode == "mean")


def test_too_long_is_refused_in_words(engine):
    with pytest.raises(RequestError, match=r"129 tokens\) is longer than .* \(128 tokens\)"):
        engine.encode(input_ids=[7] * (LONGEST + 1))
    assert engine.encode(input_ids=[7] * LONGEST)["meta_info"]["prompt_tokens"] == LONGEST


def test_cut_text_keeps_its_end(folder, case):
    """With --allow-auto-truncate: the token that ends a text ends what is left of it."""
    from jaxserve.messages import EmbeddingInfo, EncoderInfo, EngineInfo
    from jaxserve.prompt_items import Item
    from jaxserve.request_builder import make_request
    from jaxserve.sampling_params import SamplingParams

    values = dict.fromkeys(EngineInfo.__struct_fields__, 0)
    values |= {"context_length": 10, "max_total_num_tokens": 100, "vocab_size": 320}
    values |= {"embedding": EmbeddingInfo(1, None), "encoder": EncoderInfo(2), "experts": None}
    info, tokenizer = EngineInfo(**values), Tokenizer(folder)
    whole = tokenizer.encode("a week is seven " * 10)
    item = Item("rid", "a week is seven " * 10, None, SamplingParams())
    cut = make_request(item, tokenizer, info, allow_auto_truncate=True).prompt_ids
    print(re.sub(r"\s+", " ", json.dumps([whole, cut])))
    assert len(whole) > 10 and cut == [*whole[:9], whole[-1]]

"""Logprobs as the engine tells them against those of the model itself, run densely over the text.

Random weights, so that no distribution is sharp, and float32. The prompt is told of once, whatever
is cached, chunked, batched or computed again; what was drawn is told with its penalties.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import Engine
from jaxserve.models.config import ModelConfig
from jaxserve.models.interface import CausalAttention
from jaxserve.models.registry import create_model
from jaxserve.models.weights import Checkpoint, load_params
from tests.golden.cases import CASES
from tests.golden.random_checkpoint import write_checkpoint
from tests.server.serving import programs_folder

CASE = next(case for case in CASES if case.name == "qwen3")
CLOSE = 1e-4
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(CASE.config, path, CASE.seed, **CASE.checkpoint_options())
    return str(path)


@pytest.fixture(scope="module")
def engine(folder, pytestconfig):
    with Engine(
        model_path=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        page_size=4,
        chunked_prefill_size=12,
        max_running_requests=4,
        max_total_tokens=160,
        compilation_cache_dir=programs_folder(pytestconfig),
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def logits(folder):
    """Scores after each token of a text, f32[T, V]."""
    config = ModelConfig.from_pretrained(folder, None, {})
    graphdef, abstract = create_model(config, dtype=jnp.float32)
    params = load_params(Checkpoint(folder), abstract)

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        hidden, _ = model(tokens, jnp.arange(len(tokens), dtype=jnp.int32), CausalAttention())
        return model.logits(hidden)

    def of(tokens: list[int]) -> np.ndarray:
        padded = np.zeros(128, np.int32)  # one shape; causal, so what follows does not matter
        padded[: len(tokens)] = tokens
        return np.asarray(run(params, jnp.asarray(padded)))[: len(tokens)]

    return of


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, CASE.config["vocab_size"], length).tolist()


def check_prompt(meta: dict, prompt: list[int], start: int, expected: np.ndarray) -> None:
    told = meta["input_token_logprobs"]
    assert [token for _, token, _ in told] == prompt[start:]
    assert told[0][0] is None
    values = [expected[i - 1, prompt[i]] for i in range(start + 1, len(prompt))]
    np.testing.assert_allclose([value for value, *_ in told[1:]], values, atol=CLOSE)


def check_output(meta: dict, ids: list[int], expected: np.ndarray) -> None:
    """`expected[i]` is what the i-th token was drawn from."""
    told = meta["output_token_logprobs"]
    assert [token for _, token, _ in told] == ids
    values = expected[np.arange(len(ids)), ids]
    np.testing.assert_allclose([value for value, *_ in told], values, atol=CLOSE)
    assert meta["output_token_logprobs_length"] == len(ids)


@pytest.mark.parametrize("start", [-1, 0, 1, 11, 12, 13, 36, 37])
def test_prompt_and_output_have_the_models_own_logprobs(engine, logits, start):
    prompt = prompt_of(37)
    engine.flush_cache()
    for is_cached in (False, True):
        answer = engine.generate(
            input_ids=prompt,
            sampling_params={"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=start,
        )
        meta, ids = answer["meta_info"], answer["output_ids"]
        expected = log_softmax(logits(prompt + ids))
        if 0 <= start < len(prompt):
            check_prompt(meta, prompt, start, expected)
        else:
            assert meta["input_token_logprobs"] == []
        check_output(meta, ids, expected[len(prompt) - 1 : -1])
        most = len(prompt) - 1 if start < 0 else min(start, len(prompt) - 1)
        assert meta["cached_tokens"] == (most if is_cached else 0)
    print(f"prompt of {len(prompt)} in chunks of 12, from {start}: cached {meta['cached_tokens']}")


def test_logprobs_are_those_of_the_temperature_that_drew(engine, logits):
    prompt = prompt_of(9)
    answer = engine.generate(
        input_ids=prompt,
        sampling_params={"temperature": 1.7, "top_k": 50, "max_new_tokens": 8, "ignore_eos": True},
        return_logprob=True,
    )
    ids = answer["output_ids"]
    expected = log_softmax(logits(prompt + ids)[len(prompt) - 1 : -1] / 1.7)
    check_output(answer["meta_info"], ids, expected)


def test_tops_and_asked_ids_at_every_position(engine, logits):
    prompt, asked = prompt_of(21), [7, 0, 55]
    answer = engine.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=3,
        top_logprobs_num=5,
        token_ids_logprob=asked,
    )
    meta, ids = answer["meta_info"], answer["output_ids"]
    expected = log_softmax(logits(prompt + ids))
    sides = {
        "input": expected[3 : len(prompt) - 1],
        "output": expected[len(prompt) - 1 : -1],
    }
    for side, rows in sides.items():
        tops, probes = meta[f"{side}_top_logprobs"], meta[f"{side}_token_ids_logprobs"]
        if side == "input":
            assert tops[0] is None and probes[0] is None
            tops, probes = tops[1:], probes[1:]
        assert len(tops) == len(probes) == len(rows)
        for row, top, probe in zip(rows, tops, probes, strict=True):
            best = np.argsort(-row, kind="stable")[:5]
            np.testing.assert_allclose([value for value, *_ in top], row[best], atol=CLOSE)
            assert [token for _, token, _ in probe] == asked
            np.testing.assert_allclose([value for value, *_ in probe], row[asked], atol=CLOSE)
    best = [top[0] for top in meta["output_top_logprobs"]]
    assert best == meta["output_token_logprobs"], "at temperature 0, exactly"


def test_penalties_and_bias_count_in_what_is_told(engine, logits):
    prompt = prompt_of(6)
    fields = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3}
    answer = engine.generate(
        input_ids=prompt,
        sampling_params={
            **fields,
            "temperature": 0.0,
            "max_new_tokens": 12,
            "ignore_eos": True,
            "logit_bias": {"9": 2.5, "10": 2.0},
        },
        return_logprob=True,
    )
    ids = answer["output_ids"]
    scores = logits(prompt + ids)[len(prompt) - 1 : -1].astype(np.float64)
    for i, row in enumerate(scores):
        counts = np.bincount(ids[:i], minlength=len(row))
        row[:] = np.where(counts > 0, np.where(row > 0, row / 1.3, row * 1.3), row)
        row -= 1.5 * counts + 0.5 * (counts > 0)
        row[9] += 2.5
        row[10] += 2.0
    assert ids == scores.argmax(axis=1).tolist()
    check_output(answer["meta_info"], ids, log_softmax(scores))
    plain = engine.generate(
        input_ids=prompt, sampling_params={"temperature": 0.0, "max_new_tokens": 12}
    )
    assert plain["output_ids"] != ids


def test_all_is_told_once_beside_others_and_after_retractions(engine, logits):
    """Six requests where the pool holds fewer: penalties are counted anew, nothing is repeated."""
    engine.flush_cache()
    prompts = [prompt_of(20 + i, seed=i) for i in range(6)]
    sampling = {
        "temperature": 0.9,
        "sampling_seed": 3,
        "max_new_tokens": 40,
        "ignore_eos": True,
        "frequency_penalty": 0.4,
    }
    options = {"return_logprob": True, "logprob_start_len": 2, "top_logprobs_num": 1}
    together = engine.generate(input_ids=prompts, sampling_params=sampling, **options)
    retractions = [answer["meta_info"]["num_retractions"] for answer in together]
    print(f"retractions: {retractions}")
    assert sum(retractions) > 0
    for prompt, answer in zip(prompts, together, strict=True):
        meta, ids = answer["meta_info"], answer["output_ids"]
        scores = logits(prompt + ids)
        check_prompt(meta, prompt, 2, log_softmax(scores))
        drawn = scores[len(prompt) - 1 : -1].astype(np.float64)
        drawn -= 0.4 * np.stack(
            [np.bincount(ids[:i], minlength=drawn.shape[1]) for i in range(len(ids))]
        )
        check_output(meta, ids, log_softmax(drawn / 0.9))
        assert len(meta["output_top_logprobs"]) == len(ids) == 40
        engine.flush_cache()
        alone = engine.generate(input_ids=prompt, sampling_params=sampling, **options)
        assert alone["output_ids"] == ids


@pytest.mark.parametrize(
    "params,always,never",
    [
        ({"logit_bias": {"5": 1e300}}, 5, None),
        ({"logit_bias": {"5": 3e38, "6": -3e38}, "temperature": 2e-6}, 5, 6),
        ({"logit_bias": {str(i): -1e300 for i in range(0, 256, 2)}}, None, 4),
        ({"repetition_penalty": 1e-300, "temperature": 2e-6}, None, None),
        ({"temperature": 1e300, "min_new_tokens": 4, "stop_token_ids": [4]}, None, 4),
        ({"temperature": 1e-6, "top_p": 1e-300, "min_p": 1e-300}, None, None),
    ],
    ids=str,
)
def test_values_beyond_float32_leave_the_scores_finite(engine, params, always, never):
    sampling = {"max_new_tokens": 4, "ignore_eos": "stop_token_ids" not in params} | params
    answer = engine.generate(input_ids=prompt_of(5), sampling_params=sampling, return_logprob=True)
    print(answer["meta_info"]["finish_reason"], answer["meta_info"]["output_token_logprobs"])
    assert answer["meta_info"]["finish_reason"]["type"] == "length"
    assert all(np.isfinite(entry[0]) for entry in answer["meta_info"]["output_token_logprobs"])
    assert always is None or set(answer["output_ids"]) == {always}
    assert never not in answer["output_ids"]


def test_least_length_holds_back_every_stop(engine):
    prompt = prompt_of(5)
    ids = engine.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0.0, "max_new_tokens": 9, "ignore_eos": True},
    )["output_ids"]
    stop = {"temperature": 0.0, "max_new_tokens": 9, "stop_token_ids": [ids[0]]}
    ended = engine.generate(input_ids=prompt, sampling_params=stop)
    assert ended["output_ids"] == ids[:1]
    longer = engine.generate(input_ids=prompt, sampling_params=stop | {"min_new_tokens": 6})
    assert len(longer["output_ids"]) >= 6 and ids[0] not in longer["output_ids"][:6]


def test_samples_of_one_prompt_have_seeds_of_their_own(engine):
    prompt = prompt_of(8)
    sampling = {"temperature": 1.0, "max_new_tokens": 10, "ignore_eos": True, "sampling_seed": 5}
    samples = engine.generate(input_ids=[prompt, prompt], sampling_params=sampling | {"n": 3})
    outputs = [tuple(sample["output_ids"]) for sample in samples]
    assert len(samples) == 6 and outputs[:3] == outputs[3:] and len(set(outputs)) == 3
    alone = engine.generate(input_ids=prompt, sampling_params=sampling)
    assert tuple(alone["output_ids"]) == outputs[0], "the first is as without n"
    assert len({sample["meta_info"]["id"] for sample in samples}) == 6


def test_stream_repeats_all_logprobs_so_far(engine):
    events = list(
        engine.generate(
            input_ids=prompt_of(30),
            sampling_params={"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
            stream=True,
        )
    )
    last = events[-1]["meta_info"]
    assert events[-1]["output_ids"] and len(events) > 1
    for event in events:
        meta = event["meta_info"]
        assert meta["input_token_logprobs"] == last["input_token_logprobs"]
        count = len(event["output_ids"])
        assert meta["output_token_logprobs"] == last["output_token_logprobs"][:count]

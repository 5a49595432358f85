"""The body of /generate to requests, without a server. What is refused: tests/server/test_errors.py
sends each wrong body; here are the rules that shape the right ones."""

import pathlib

import pytest

import jaxserve
from jaxserve.errors import RequestError
from jaxserve.generate_request import GenerateRequest
from jaxserve.messages import EngineInfo
from jaxserve.request_builder import make_request
from jaxserve.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(pathlib.Path(jaxserve.__file__).with_name("demo_model"))


def info(*, context_length: int = 100, max_total_num_tokens: int = 1000) -> EngineInfo:
    return EngineInfo(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        model_folder="",
        tokenizer_folder=None,
        vocab_size=1024,
        context_length=context_length,
        max_total_num_tokens=max_total_num_tokens,
        max_running_requests=4,
        chunked_prefill_size=64,
        page_size=1,
        eos_token_ids=[2],
        dtype="float32",
        device="cpu",
        num_devices=1,
        weight_bytes=0,
        kv_cache_bytes=0,
        startup_seconds=0.0,
        startup_phases={},
    )


def request(length: int, engine: EngineInfo | None = None, options=None, **sampling):
    body = {"input_ids": [5] * length, "sampling_params": sampling}
    (item,) = GenerateRequest.parse(body).items
    return make_request(item, None, engine or info(), **options or {})


def test_batch_is_what_a_list_makes_it():
    def shape(**body):
        parsed = GenerateRequest.parse(body)
        return len(parsed.items), parsed.is_batch

    assert shape(text="a") == shape(input_ids=[1, 2]) == (1, False)
    assert shape(text=["a"]) == shape(input_ids=[[1, 2]]) == (1, True)
    assert shape(text=["a", "b"], input_ids=[[1], [2]]) == (2, True)
    assert shape(text="a", input_ids=[1]) == (1, False)


def test_each_prompt_gets_its_own_parameters_or_the_common_ones():
    body = {"text": ["a", "b"], "sampling_params": [{"top_k": 1}, None]}
    assert [item.sampling.top_k for item in GenerateRequest.parse(body).items] == [1, -1]
    body["sampling_params"] = {"top_k": 7}
    assert [item.sampling.top_k for item in GenerateRequest.parse(body).items] == [7, 7]


def test_preferred_parameters_lie_under_the_requests_own():
    preferred = {"top_k": 3, "max_new_tokens": 9}
    body = {"text": ["a", "b", "c"], "sampling_params": [{"top_k": 5}, {}, None]}
    items = GenerateRequest.parse(body, preferred).items
    assert [item.sampling.top_k for item in items] == [5, 3, 3]
    assert [item.sampling.max_new_tokens for item in items] == [9, 9, 9]
    assert [item.asked_tokens for item in items] == [None] * 3, "clipped, not refused"


def test_rids_are_given_made_or_numbered():
    def rids(**body):
        return [item.rid for item in GenerateRequest.parse(body).items]

    assert rids(text="a", rid="x") == rids(text="a", rid=["x"]) == ["x"]
    assert rids(text=["a", "b"], rid="x") == ["x_0", "x_1"]
    made = rids(text=["a"] * 100)
    assert len(set(made)) == 100 and {len(rid) for rid in made} == {32}


def test_most_prompts_of_a_request():
    assert len(GenerateRequest.parse({"text": ["a"] * 256}).items) == 256
    with pytest.raises(RequestError, match="at most 256 prompts in a request, got 257"):
        GenerateRequest.parse({"text": ["a"] * 257})


def test_text_is_tokenized_and_ids_are_taken_as_they_are(tokenizer):
    (item,) = GenerateRequest.parse({"text": "What is", "input_ids": None}).items
    assert make_request(item, tokenizer, info()).prompt_ids == tokenizer.encode("What is")
    (item,) = GenerateRequest.parse({"text": "What is", "input_ids": [7, 8]}).items
    assert make_request(item, tokenizer, info()).prompt_ids == [7, 8]


def test_without_a_tokenizer_text_and_stop_strings_are_refused():
    (item,) = GenerateRequest.parse({"text": "a"}).items
    with pytest.raises(RequestError, match="cannot accept text prompts") as refused:
        make_request(item, None, info())
    assert refused.value.param == "text"
    with pytest.raises(RequestError, match="cannot accept stop strings") as refused:
        request(3, stop="x")
    assert refused.value.param == "stop"


@pytest.mark.parametrize(
    "length,asked,limit",
    [
        (1, 10, 10),
        (10, 90, 89),  # a context of 100 less the prompt and one
        (10, 89, 89),
        (10, 88, 88),
        (10, None, 88 + 1),
        (94, 6, 5),
        (94, None, 5),
        (94, 0, 0),
        (50, 0, 0),
    ],
)
def test_new_tokens_are_clipped_to_the_context(length, asked, limit):
    made = request(length, max_new_tokens=asked)
    longest = 99  # SGLang's max_req_len: one less than the context
    assert made.max_new_tokens == min(limit, longest - length - 1)
    assert len(made.prompt_ids) + made.max_new_tokens < 100


def test_default_of_128_new_tokens_is_clipped_and_never_refused():
    assert request(94).max_new_tokens == 4
    assert request(5, info(context_length=4096)).max_new_tokens == 128


def test_pool_smaller_than_the_context_limits_too():
    pool = info(max_total_num_tokens=32)
    assert request(10, pool, max_new_tokens=None).max_new_tokens == 31 - 10 - 1
    assert request(26, pool, max_new_tokens=None).max_new_tokens == 31 - 26 - 1
    with pytest.raises(RequestError, match=r"\(27 tokens\) exceeds the maximum allowed .* \(26 "):
        request(27, pool)


@pytest.mark.parametrize(
    "length,asked,words,param",
    [
        (100, None, r"The input \(100 tokens\) is longer than .* \(100 tokens\)\.", "input_ids"),
        (95, None, r"Input length \(95 tokens\) exceeds .* \(94 tokens\)\. Use a", "input_ids"),
        (
            50,
            51,
            r"^Requested token count exceeds the model's maximum context length of 100 tokens\. "
            r"You requested a total of 101 tokens: 50 tokens from the input messages and 51 ",
            "max_new_tokens",
        ),
    ],
)
def test_too_long_is_refused_in_sglangs_words(length, asked, words, param):
    with pytest.raises(RequestError, match=words) as refused:
        request(length, max_new_tokens=asked)
    assert refused.value.param == param


def test_truncation_cuts_the_prompt_then_the_output():
    cut = {"allow_auto_truncate": True}
    for length in (94, 95, 100, 5000):
        made = request(length, options=cut, max_new_tokens=500)
        assert (len(made.prompt_ids), made.max_new_tokens) == (94, 4)


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("which", ["context_length", "max_total_num_tokens"])
@pytest.mark.parametrize("truncate", [False, True])
def test_tiny_limits_never_make_a_negative_number_of_tokens(which, size, truncate):
    tiny = info(**{which: size})
    for length in range(1, 14):
        try:
            made = request(length, tiny, {"allow_auto_truncate": truncate}, max_new_tokens=None)
        except RequestError:
            continue
        assert made.max_new_tokens >= 0
        assert 0 < len(made.prompt_ids) + made.max_new_tokens <= size


def test_seed_is_the_requests_the_servers_or_random():
    assert request(1, sampling_seed=7).seed == 7
    assert request(1, sampling_seed=-1).seed == 2**64 - 1
    assert request(1, sampling_seed=7, options={"default_seed": 9}).seed == 7
    assert request(1, options={"default_seed": 9}).seed == 9
    assert len({request(1).seed for _ in range(10)}) == 10

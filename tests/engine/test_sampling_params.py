"""What a caller may ask of the sampler, and in which words the rest is refused."""

import msgspec
import pytest

from jaxserve.errors import RequestError
from jaxserve.sampling_params import NOT_SERVED, SamplingParams

parse = SamplingParams.parse


def refusal(**fields) -> RequestError:
    with pytest.raises(RequestError) as raised:
        parse(fields)
    assert raised.value.status == 400
    return raised.value


def test_defaults():
    params = parse({})
    assert params == SamplingParams()
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (
        128,
        1,
        1,
        -1,
    )
    assert (params.stop, params.stop_token_ids, params.sampling_seed) == ((), (), None)
    assert params.skip_special_tokens and not params.ignore_eos and not params.no_stop_trim
    assert params.stream_interval is None and not params.is_greedy


def test_null_means_the_default():
    names = [name for name in SamplingParams.__struct_fields__ if name != "max_new_tokens"]
    assert parse(dict.fromkeys(names)) == parse({})
    assert parse(dict.fromkeys(NOT_SERVED)) == parse({})


def test_null_max_new_tokens_means_no_limit():
    assert parse({"max_new_tokens": None}).max_new_tokens is None


@pytest.mark.parametrize(
    "name,value",
    [
        ("max_new_tokens", 0),
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_p", 1e-9),
        ("top_p", 1),
        ("top_k", -1),
        ("top_k", 1),
        ("top_k", 2**31 - 1),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("frequency_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("repetition_penalty", 1e-9),
        ("repetition_penalty", 2.0),
        ("min_new_tokens", 128),
        ("logit_bias", dict.fromkeys(range(1024), -100.0)),
        ("n", 64),
        ("stream_interval", 1),
        ("sampling_seed", -(2**63)),
        ("sampling_seed", 2**63 - 1),
        ("stop", ["x" * 256] * 32),
        ("stop_token_ids", list(range(128))),
    ],
)
def test_ends_of_the_ranges_are_allowed(name, value):
    expected = tuple(value) if isinstance(value, list) else value
    assert getattr(parse({name: value}), name) == expected


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("max_new_tokens", -1, "max_new_tokens must be at least 0, got -1."),
        ("temperature", -0.5, "temperature must be a non-negative finite number, got -0.5."),
        ("temperature", INF, "temperature must be a non-negative finite number, got inf."),
        ("temperature", NAN, "temperature must be a non-negative finite number, got nan."),
        ("top_p", 0.0, "top_p must be in (0, 1], got 0.0."),
        ("top_p", -0.5, "top_p must be in (0, 1], got -0.5."),
        ("top_p", 1.5, "top_p must be in (0, 1], got 1.5."),
        ("top_p", NAN, "top_p must be in (0, 1], got nan."),
        ("top_p", INF, "top_p must be in (0, 1], got inf."),
        ("top_k", 0, "top_k must be -1 (disable) or at least 1, got 0."),
        ("top_k", -2, "top_k must be -1 (disable) or at least 1, got -2."),
        ("top_k", 2**31, "top_k must be -1 (disable) or at least 1, got 2147483648."),
        ("stop", ["x"] * 33, "at most 32 stop strings are allowed, got 33"),
        ("stop", "", "a stop string must have 1 to 256 bytes, got 0"),
        ("stop", ["ok", ""], "a stop string must have 1 to 256 bytes, got 0"),
        ("stop", "é" * 129, "a stop string must have 1 to 256 bytes, got 258"),
        ("stop_token_ids", [1] * 129, "at most 128 stop_token_ids are allowed, got 129"),
        ("min_p", -0.1, "min_p must be in [0, 1], got -0.1."),
        ("min_p", NAN, "min_p must be in [0, 1], got nan."),
        ("frequency_penalty", 2.1, "frequency_penalty must be in [-2, 2], got 2.1."),
        ("presence_penalty", NAN, "presence_penalty must be in [-2, 2], got nan."),
        (
            "repetition_penalty",
            0.0,
            "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 0.0.",
        ),
        ("min_new_tokens", 129, "min_new_tokens must be in [0, max_new_tokens(128)], got 129."),
        ("min_new_tokens", -1, "min_new_tokens must be in [0, max_new_tokens(128)], got -1."),
        ("logit_bias", {"7": INF}, "logit_bias of 7 must be finite, got inf"),
        (
            "logit_bias",
            {str(i): 0.0 for i in range(1025)},
            "at most 1024 entries of logit_bias are allowed, got 1025",
        ),
        ("n", 0, "n must be from 1 to 64, got 0."),
        ("n", 65, "n must be from 1 to 64, got 65."),
        ("stream_interval", 0, "stream_interval must be at least 1, got 0."),
        (
            "sampling_seed",
            2**63,
            "sampling_seed must be in [-2**63, 2**63 - 1], got 9223372036854775808.",
        ),
        (
            "sampling_seed",
            -(2**63) - 1,
            "sampling_seed must be in [-2**63, 2**63 - 1], got -9223372036854775809.",
        ),
    ],
)
def test_value_out_of_range_is_refused_in_words(name, value, message):
    error = refusal(**{name: value})
    assert str(error) == message and error.param == name


WRONG_TYPES = {
    "max_new_tokens": [True, 1.0, 1.5, "1", [1]],
    "temperature": [True, "1", [1.0]],
    "top_p": [True, "0.5"],
    "top_k": [True, 2.0, "2"],
    "min_p": [True, "0.5"],
    "frequency_penalty": ["1", [1.0]],
    "presence_penalty": [False, {}],
    "repetition_penalty": [True, "1"],
    "min_new_tokens": [1.0, "1", True],
    "logit_bias": [5, [1], {"x": 1.0}, {"1.5": 1.0}, {"1": "1"}, {"1": None}, {"1": True}],
    "n": [True, 1.5, "2"],
    "spaces_between_special_tokens": [1, "no"],
    "stop": [5, {"a": 1}, ["a", None], [["a"]], [1]],
    "stop_token_ids": [5, "5", [True], [1.0], ["1"], [None]],
    "ignore_eos": [1, 0, "true", []],
    "skip_special_tokens": [1, "false"],
    "no_stop_trim": [0, "x"],
    "stream_interval": [True, 1.0, "1"],
    "sampling_seed": [True, 1.0, "1"],
}


@pytest.mark.parametrize(
    "name,value", [(name, value) for name, values in WRONG_TYPES.items() for value in values]
)
def test_value_of_another_type_is_refused_by_name(name, value):
    assert name in str(refusal(**{name: value}))


def test_every_field_is_tested_with_another_type():
    assert set(WRONG_TYPES) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("value", [1, None])
def test_unknown_key_is_named(value):
    assert "unknown field `temprature`" in str(refusal(temprature=value))


@pytest.mark.parametrize("given", [None, [], "x", 5, [("top_k", 1)]])
def test_only_an_object_will_do(given):
    with pytest.raises(RequestError, match="sampling_params must be an object, got"):
        parse(given)


def test_key_that_is_no_string_is_refused():
    with pytest.raises(RequestError, match="Expected `str`"):
        parse({1: 2})


@pytest.mark.parametrize("name", NOT_SERVED)
def test_feature_that_is_not_served_is_accepted_when_it_does_nothing(name):
    assert parse({name: NOT_SERVED[name]}) == parse({})


@pytest.mark.parametrize(
    "name,value",
    [
        ("stop_regex", "a+"),
        ("json_schema", "{}"),
        ("regex", "a+"),
        ("ebnf", 'root ::= "a"'),
        ("structural_tag", "{}"),
        ("custom_params", {"a": 1}),
        ("beam_width", True),
        ("beam_width", 2),
    ],
)
def test_feature_that_is_not_served_is_refused_in_words(name, value):
    error = refusal(**{name: value})
    assert str(error) == f"{name} is not supported by this server yet" and error.param == name


def test_stop_may_be_one_string():
    assert parse({"stop": "END"}) == parse({"stop": ["END"]})
    assert parse({"stop": "END"}).stop == ("END",)


def test_stop_that_is_no_unicode_text_is_refused():
    assert refusal(stop="\ud800").param == "stop"


@pytest.mark.parametrize(
    "fields,is_greedy",
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 9e-7}, True),
        ({"temperature": 1e-6}, False),
        ({"temperature": 5.0, "top_k": 1}, True),
        ({"top_k": 2}, False),
        ({"top_p": 1e-9}, False),
    ],
)
def test_is_greedy_below_a_temperature_and_with_one_candidate(fields, is_greedy):
    assert parse(fields).is_greedy == is_greedy


def test_is_immutable():
    params = parse({"stop": ["a"]})
    with pytest.raises(AttributeError):
        params.temperature = 0.0


WHOLE_NUMBERS = ["max_new_tokens", "stream_interval", "sampling_seed"]


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_largest_number_reaches_the_engine(name):
    params = parse({name: 2**63 - 1})
    sent = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_number_beyond_64_bits_is_refused(name):
    """It could not be sent to the engine."""
    assert name in str(refusal(**{name: 2**70}))

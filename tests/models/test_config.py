"""Reading config.json: both spellings, every architecture's own rules, and values that lie."""

import dataclasses
import json

import pytest

from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import ARCHITECTURES
from jaxserve.models.rope import inverse_frequencies

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}


def read(base: dict = LLAMA, **changes) -> ModelConfig:
    return ModelConfig.from_dict(base | changes)


def without(base: dict, key: str) -> dict:
    return {name: value for name, value in base.items() if name != key}


def write(folder, config=LLAMA, generation=None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def test_reads_the_sizes():
    config = read(rms_norm_eps=1e-5, tie_word_embeddings=True)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (3, 4, 2)
    assert (config.head_dim, config.context_length) == (16, 512)
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings
    assert config.windows == (None, None, None)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().num_layers = 1


def test_silent_config_gets_the_defaults_of_transformers():
    config = read(without(LLAMA, "num_key_value_heads"))
    assert config.num_kv_heads == config.num_heads
    assert config.rms_norm_eps == 1e-6 and config.rope.theta == 10000.0
    assert config.dtype == "bfloat16" and not config.tie_word_embeddings
    assert config.eos_token_ids == ()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_in_both_spellings(key):
    assert read(**{key: "float16"}).dtype == "float16"


def test_dtype_goes_before_torch_dtype():
    assert read(dtype="float32", torch_dtype="float16").dtype == "float32"


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def test_rope_in_both_spellings():
    old = read(rope_theta=5e5, rope_scaling=SCALING)
    new = read(rope_parameters=SCALING | {"rope_theta": 5e5})
    assert old == new
    assert old.rope.theta == 5e5 and old.rope.rope_type == "llama3" and old.rope.factor == 8.0
    assert old.rope.original_context_length == 128


def test_rope_type_in_both_spellings():
    scaling = {"factor": 2.0}
    old = read(rope_scaling=scaling | {"type": "linear"})
    assert old == read(rope_scaling=scaling | {"rope_type": "linear"})
    assert old.rope.rope_type == "linear"


@pytest.mark.parametrize(
    "key,most", [("num_hidden_layers", 2**14), ("hidden_size", 2**31), ("head_dim", 2**31)]
)
def test_sizes_have_a_bound(key, most):
    for value in (most + 1, 300_000_000_000, 10**5000):
        with pytest.raises(ValueError, match=f"config.json: {key} is more than {most}$"):
            read(**{key: value})


def test_null_rope_scaling_is_none():
    assert read(rope_scaling=None) == read()


def test_rope_options_reach_the_config():
    options = {"beta_fast": 6.0, "beta_slow": 2.0, "attention_factor": 1.5, "truncate": False}
    rope = read(rope_scaling=SCALING | options | {"rope_type": "yarn", "mscale": None}).rope
    assert (rope.beta_fast, rope.beta_slow, rope.attention_factor) == (6.0, 2.0, 1.5)
    assert not rope.truncate and rope.mscale is None


def test_original_context_of_dynamic_rope_is_the_models_own():
    rope = read(rope_scaling=SCALING | {"rope_type": "dynamic"}).rope
    assert rope.original_context_length == 512


def test_unknown_rope_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="'longrope' is not served; known: default, linear,"):
        read(rope_scaling={"rope_type": "longrope", "factor": 4.0})


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "yarn"])
def test_rope_scaling_needs_a_factor(rope_type):
    with pytest.raises(ValueError, match=f"rope_type '{rope_type}' needs a factor"):
        read(rope_scaling={"rope_type": rope_type})


@pytest.mark.parametrize("name", ["low_freq_factor", "high_freq_factor"])
def test_llama3_needs_its_frequencies(name):
    with pytest.raises(ValueError, match=f"rope_type 'llama3' needs a {name}"):
        read(rope_scaling=without(SCALING, name))
    with pytest.raises(ValueError, match=f"rope_type 'llama3' needs a {name}"):
        read(rope_parameters=SCALING | {name: None})


def test_llama3_needs_two_different_frequencies():
    with pytest.raises(ValueError, match="low_freq_factor 4.0 is not below high_freq_factor 4.0"):
        read(rope_scaling=SCALING | {"low_freq_factor": 4.0})


ROPE_NUMBERS = (
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


@pytest.mark.parametrize("value", ["1", -1.0, True, [1.0], {}, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ROPE_NUMBERS)
def test_rope_option_must_be_a_positive_number(name, value):
    for rope_type in ("llama3", "yarn", "default"):
        with pytest.raises(ValueError, match=f"config.json: {name} is .* needs a positive number"):
            read(rope_scaling=SCALING | {"rope_type": rope_type, name: value})


@pytest.mark.parametrize("value", [1, "yes", []], ids=str)
def test_rope_truncate_must_be_true_or_false(value):
    with pytest.raises(ValueError, match="config.json: truncate is"):
        read(rope_scaling=SCALING | {"rope_type": "yarn", "truncate": value})


def test_no_mscale_may_be_written_as_nought():
    """As DeepSeek has it."""
    rope = read(rope_scaling=SCALING | {"rope_type": "yarn", "mscale_all_dim": 0.0}).rope
    assert rope.mscale_all_dim is None


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0},
        {"rope_type": "dynamic", "factor": 1e308, "rope_theta": 1e300},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e-320},
        {"rope_type": "default", "rope_theta": 1e-320},
        {"rope_type": "linear", "factor": 1e-320},
    ],
    ids=str,
)
def test_rope_without_frequencies_is_refused(scaling):
    config = read(rope_parameters=scaling, head_dim=64)
    with pytest.raises(ValueError, match=f"no frequencies follow from .*{scaling['rope_type']}"):
        inverse_frequencies(config.rope, 64, 10**6)


@pytest.mark.parametrize("place", [{}, {"rope_scaling": {"partial_rotary_factor": 0.5}}])
def test_refuses_partial_rotary(place):
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        read(**(place or {"partial_rotary_factor": 0.5}))


def test_refuses_another_activation():
    with pytest.raises(ValueError, match="hidden_act 'gelu': only silu"):
        read(hidden_act="gelu")


def test_takes_the_first_architecture_that_is_served():
    config = read(architectures=["Unheard", "Qwen2ForCausalLM", "LlamaForCausalLM"])
    assert config.architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize("named", [["GPT2LMHeadModel"], [], None, "LlamaForCausalLM", [None]])
def test_unknown_architecture_lists_the_known_ones(named):
    with pytest.raises(ValueError, match="are not served; known: ") as raised:
        read(architectures=named)
    assert all(name in str(raised.value) for name in ARCHITECTURES)


def test_biases():
    llama, silent = read(attention_bias=True, mlp_bias=True), read()
    assert llama.attention_bias and llama.attention_out_bias and llama.mlp_bias
    assert not (silent.attention_bias or silent.attention_out_bias or silent.mlp_bias)
    qwen2 = read(QWEN2)
    assert qwen2.attention_bias and not qwen2.attention_out_bias and not qwen2.mlp_bias
    qwen3 = read(QWEN3, attention_bias=True, mlp_bias=True)
    assert qwen3.attention_bias and qwen3.attention_out_bias and not qwen3.mlp_bias


def test_qwen3_head_dim_is_128_unless_given():
    assert read(QWEN3).head_dim == 128
    assert read(QWEN3, head_dim=32).head_dim == 32


def test_mistral_windows_cover_all_layers():
    assert read(MISTRAL, sliding_window=24).windows == (24, 24, 24)
    assert read(MISTRAL, sliding_window=None).windows == (None, None, None)
    assert read(MISTRAL).windows == (4096, 4096, 4096), "what transformers takes"


@pytest.mark.parametrize("base", [QWEN2, QWEN3])
def test_qwen_windows_are_those_of_the_last_layers_when_on(base):
    window = {"sliding_window": 24, "max_window_layers": 1}
    assert read(base, use_sliding_window=True, **window).windows == (None, 24, 24)
    assert read(base, use_sliding_window=False, **window).windows == (None, None, None)
    assert read(base, **window).windows == (None, None, None)
    assert read(base, use_sliding_window=True, sliding_window=24).windows == (None,) * 3


def test_layer_types_decide_which_layers_have_the_window():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    on = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 3}
    assert read(QWEN2, layer_types=types, **on).windows == (24, None, 24)
    assert read(QWEN2, layer_types=types, sliding_window=24).windows == (None, None, None)


@pytest.mark.parametrize(
    "types,words",
    [
        (["full_attention"], "1 layer_types for 3 layers"),
        (["full_attention", "chunked", "linear"], r"layer_types \['chunked', 'linear'\]"),
    ],
)
def test_refuses_layer_types_that_do_not_fit(types, words):
    with pytest.raises(ValueError, match=words):
        read(MISTRAL, sliding_window=24, layer_types=types)


def test_llama_ignores_a_window():
    assert read(sliding_window=24, use_sliding_window=True).windows == (None, None, None)


@pytest.mark.parametrize("given,ids", [(2, (2,)), ([2, 3], (2, 3)), (None, ()), ([], ())])
def test_eos_token_ids(given, ids):
    assert read(eos_token_id=given).eos_token_ids == ids


@pytest.mark.parametrize("generation,ids", [([3, 2, 4], (2, 3, 4)), (5, (2, 5)), (None, (2,))])
def test_generation_config_adds_eos_token_ids(tmp_path, generation, ids):
    write(tmp_path, LLAMA | {"eos_token_id": 2}, {"eos_token_id": generation})
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == ids


def test_context_length_goes_before_the_models_own(tmp_path):
    write(tmp_path, LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    config = ModelConfig.from_pretrained(tmp_path, context_length=2048)
    assert config.context_length == 2048
    assert config.rope.original_context_length == 512


def test_overrides_are_laid_over_the_file(tmp_path):
    write(tmp_path)
    overrides = {"num_hidden_layers": 1, "rope_theta": 7.0}
    config = ModelConfig.from_pretrained(tmp_path, overrides=overrides)
    assert config == read(**overrides) != read()


REQUIRED = [key for key in LLAMA if key not in ("architectures", "num_key_value_heads")]


@pytest.mark.parametrize("value", [None, 0, -1, True, 64.0, "64", [64]])
@pytest.mark.parametrize("key", REQUIRED)
def test_required_size_must_be_a_positive_integer(key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} is "):
        read(**{key: value})


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_size_is_named(key):
    with pytest.raises(ValueError, match=f"config.json: {key} is None"):
        ModelConfig.from_dict(without(LLAMA, key))


QWEN2_WINDOW = QWEN2 | {"use_sliding_window": True, "sliding_window": 24}
SCALINGS = [SCALING | {"factor": value} for value in (0, -1, "8", float("nan"), [8.0])]
CANNOT_BE = [
    *[(LLAMA, "num_key_value_heads", value) for value in (0, -2, 3, 8, True, 2.0, "2")],
    *[(LLAMA, "head_dim", value) for value in (0, -16, 15, True, 16.0, "16")],
    *[(LLAMA, "rms_norm_eps", value) for value in (-1.0, float("nan"), "1e-6", [])],
    *[(LLAMA, "rope_theta", value) for value in (-5.0, float("inf"), "1e4", [])],
    *[(LLAMA, "rope_scaling", value) for value in (5, "linear", [1], *SCALINGS)],
    *[(LLAMA, "tie_word_embeddings", value) for value in ("yes", [True])],
    *[(LLAMA, "attention_bias", value) for value in ("no", [True])],
    *[(LLAMA, "eos_token_id", value) for value in (-1, 1.0, True, "2", [1, "2"], {})],
    *[(LLAMA, "architectures", value) for value in (5, [["LlamaForCausalLM"]])],
    *[(LLAMA, "dtype", value) for value in ("float64", "int8", 3, ["float32"])],
    *[(MISTRAL, "sliding_window", value) for value in (0, -1, 1.5, True, "24")],
    *[(MISTRAL, "layer_types", value) for value in (5, [["full_attention"]] * 3)],
    *[(QWEN2_WINDOW, "max_window_layers", value) for value in ("1", [1])],
]


@pytest.mark.parametrize(
    "base,key,value", CANNOT_BE, ids=[f"{key}={value}" for _, key, value in CANNOT_BE]
)
def test_value_that_cannot_be_is_refused_by_the_name_of_its_key(base, key, value):
    words = "rope_scaling|rope_type|factor" if key == "rope_scaling" else key
    with pytest.raises(ValueError, match=words):
        read(base, **{key: value})


def test_more_heads_than_hidden_dimensions_are_refused():
    with pytest.raises(ValueError, match="head_dim"):
        read(hidden_size=2)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
def test_file_without_an_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object"):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"a": ' * 100_000],
    ids=["empty", "half", "not UTF-8", "too deep"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_file_that_is_not_json_is_named(tmp_path, name, content):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"/{name} is not JSON"):
        ModelConfig.from_pretrained(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)

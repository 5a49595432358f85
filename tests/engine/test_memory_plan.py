"""What the device's memory is spent on."""

import pytest

from jaxserve.config import EngineConfig
from jaxserve.memory_plan import pages_per_row, plan_memory
from jaxserve.models.config import ModelConfig

GB = 10**9


def model(**changes) -> ModelConfig:
    shape = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64}
    heads = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32}
    return ModelConfig(
        **{"architecture": "x", "context_length": 1000, "dtype": "bfloat16"}
        | shape
        | heads
        | changes
    )


def plan(
    model_config=None,
    *,
    weights=GB,
    device=10 * GB,
    rows=8,
    is_cpu=False,
    state_bytes=0,
    **options,
):
    return plan_memory(
        EngineConfig(**{"model_path": "x", "weight_reload": "host"} | options),
        model_config or model(),
        weight_bytes=weights,
        device_bytes=device,
        max_rows=rows,
        is_cpu=is_cpu,
        state_bytes=state_bytes,
    )


TOKEN_BYTES = 2 * 4 * 2 * 32 * 2  # keys and values, layers, heads, head_dim, bfloat16


def test_page_holds_keys_and_values_of_every_layer():
    assert plan(page_size=1).page_bytes == TOKEN_BYTES
    assert plan(page_size=16).page_bytes == 16 * TOKEN_BYTES
    assert plan(model(dtype="float32"), page_size=1).page_bytes == 2 * TOKEN_BYTES
    assert plan(model(num_kv_heads=8), page_size=1).page_bytes == 4 * TOKEN_BYTES


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("fraction", [0.3, 0.88, 1.0])
def test_kv_cache_gets_what_the_fraction_leaves_beside_the_weights(fraction, page_size):
    made = plan(mem_fraction_static=fraction, page_size=page_size)
    room = 10 * GB * fraction - GB
    print(made)
    assert room - made.page_bytes < made.kv_cache_bytes <= room
    assert made.max_total_tokens == (made.num_pages - 1) * page_size, "one page is the trash page"
    assert made.scratch_bytes == 10 * GB - GB - made.kv_cache_bytes >= 10 * GB * (1 - fraction) - 1


def test_cpu_takes_no_more_than_every_rows_longest_context():
    assert plan(is_cpu=True, page_size=16).num_pages == 1 + 8 * 63
    little = plan(is_cpu=True, page_size=16, device=GB + 10**6, mem_fraction_static=1.0)
    assert little.num_pages == 10**6 // (16 * TOKEN_BYTES) < 8 * 63


def test_max_total_tokens_is_rounded_up_to_pages():
    for tokens, total in ((1, 16), (16, 16), (17, 32), (1000, 1008)):
        assert plan(max_total_tokens=tokens, page_size=16).max_total_tokens == total


def test_impossible_max_total_tokens_names_the_flag_and_the_most_that_fits():
    most = plan(page_size=16).max_total_tokens
    assert plan(page_size=16, max_total_tokens=most).max_total_tokens == most
    with pytest.raises(ValueError, match=rf"--max-total-tokens {most + 1} .*at most {most},"):
        plan(page_size=16, max_total_tokens=most + 1)


def test_lower_fraction_leaves_less_room():
    with pytest.raises(ValueError, match=r"--max-total-tokens 1000000 .*raise --mem-fraction"):
        plan(max_total_tokens=1_000_000, mem_fraction_static=0.15)
    assert plan(max_total_tokens=1_000_000).max_total_tokens == 1_000_000


@pytest.mark.parametrize("device", [GB, int(1.1 * GB)])
def test_weights_that_do_not_fit_name_the_flag(device):
    with pytest.raises(ValueError, match=r"the weights need 1\.00 GB, but --mem-fraction-static"):
        plan(device=device)


def test_no_room_for_one_page_names_the_flag():
    with pytest.raises(ValueError, match=r"no room for one page .*raise --mem-fraction-static"):
        plan(device=int((GB + TOKEN_BYTES) / 0.88), page_size=16)


def test_programs_must_fit_into_what_is_left():
    made = plan(mem_fraction_static=0.9, page_size=16)
    made.check_programs(made.scratch_bytes)
    with pytest.raises(ValueError) as refused:
        made.check_programs(int(1.5 * GB))
    print(refused.value)
    assert "the programs need 1.50 GB beside weights and KV cache" in str(refused.value)
    assert "--mem-fraction-static leaves 1.00 GB: lower it to 0.85," in str(refused.value)
    plan(mem_fraction_static=0.85, page_size=16).check_programs(int(1.5 * GB))


def test_nothing_is_left_for_programs_at_a_fraction_of_one():
    made = plan(mem_fraction_static=1.0, page_size=1)
    assert made.scratch_bytes < made.page_bytes
    with pytest.raises(ValueError, match=r"lower it to 0\.99,"):
        made.check_programs(10**6)


def test_state_is_no_room_for_programs():
    with_state, without = plan(state_bytes=GB), plan()
    assert with_state.kv_cache_bytes < without.kv_cache_bytes - 0.99 * GB
    assert abs(with_state.scratch_bytes - without.scratch_bytes) < 2 * with_state.page_bytes


def test_aside_keeps_room_for_a_second_copy():
    made, without = plan(weight_reload="aside", page_size=1), plan(page_size=1)
    print(made)
    assert (made.weight_reload, made.reload_bytes) == ("aside", GB)
    assert abs(without.kv_cache_bytes - made.kv_cache_bytes - GB) <= TOKEN_BYTES
    assert plan(weight_reload="in-place", page_size=1).num_pages == without.num_pages


@pytest.mark.parametrize(
    "options,way",
    [
        ({}, "aside"),
        ({"weights": 2 * GB}, "host"),
        ({"device": int(4.9 * GB)}, "host"),
        # The tokens asked for fit beside one copy, not beside two.
        ({"max_total_tokens": 7 * GB // TOKEN_BYTES}, "host"),
        ({"max_total_tokens": 6 * GB // TOKEN_BYTES}, "aside"),
    ],
)
def test_auto_is_aside_for_weights_below_a_fifth_of_the_device(options, way):
    assert plan(weight_reload="auto", page_size=1, **options).weight_reload == way


def test_no_room_for_two_copies_names_the_flag():
    with pytest.raises(ValueError, match=r"two copies .* 2\.00 GB, .*--weight-reload host"):
        plan(weight_reload="aside", device=2 * GB)


def test_same_configuration_gives_the_same_plan():
    """The compiled programs of the last start fit only then."""
    assert plan() == plan()


def test_pages_per_row():
    assert [pages_per_row(n, 16) for n in (1, 16, 17, 4096)] == [1, 1, 2, 256]

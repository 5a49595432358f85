"""Every step that the scheduler can make has a compiled shape, and no shape is wasted."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.buckets import Buckets, smallest

LIMITS = [
    (max_rows, max_prefill_tokens, growth)
    for max_rows in (1, 2, 3, 4, 5, 16, 17, 20)
    for max_prefill_tokens in (1, 2, 7, 16, 40)
    for growth in (2, 3, 4)
]


def extend_steps(max_rows: int, max_prefill_tokens: int):
    """Every (tokens, rows) that a step with prompts can have: decode rows, and a shared chunk."""
    for prefilling in range(1, max_rows + 1):
        for decoding in range(max_rows - prefilling + 1):
            for prompt_tokens in range(prefilling, max_prefill_tokens + 1):
                yield decoding + prompt_tokens, decoding + prefilling


def test_every_extend_step_fits_a_compiled_shape():
    for max_rows, max_prefill_tokens, growth in LIMITS:
        buckets = Buckets.make(max_rows, max_prefill_tokens, growth)
        shapes = set(buckets.extend_shapes())
        for num_tokens, num_rows in set(extend_steps(max_rows, max_prefill_tokens)):
            padded_tokens, padded_rows = shape = buckets.fit(num_tokens, num_rows)
            assert shape in shapes, f"{num_tokens} tokens of {num_rows} rows: {shape}"
            assert padded_tokens >= num_tokens and padded_rows >= num_rows
            assert padded_tokens != padded_rows, "that would mean decoding"


def test_every_number_of_rows_patches_and_copies_has_a_size():
    for limits in LIMITS:
        buckets = Buckets.make(*limits)
        for sizes in (buckets.decode_rows, buckets.patch_lines, buckets.copies):
            assert sizes[-1] == limits[0]
            assert all(smallest(sizes, count) >= count for count in range(limits[0] + 1))


@given(st.integers(1, 4096), st.integers(1, 1 << 20), st.sampled_from([2, 4]), st.data())
def test_any_limits_fit(max_rows, max_prefill_tokens, growth, data):
    buckets = Buckets.make(max_rows, max_prefill_tokens, growth)
    num_rows = data.draw(st.integers(1, max_rows))
    num_tokens = data.draw(st.integers(num_rows, num_rows - 1 + max_prefill_tokens))
    assert buckets.fit(num_tokens, num_rows) in buckets.extend_shapes()
    assert smallest(buckets.decode_rows, num_rows) >= num_rows


def test_sizes_grow_by_the_factor_up_to_the_limit():
    buckets = Buckets.make(max_rows=20, max_prefill_tokens=100, growth=2)
    assert buckets.decode_rows == (1, 2, 4, 8, 16, 20)
    assert buckets.extend_rows == buckets.patch_lines == buckets.copies == (4, 20)
    assert buckets.extend_tokens == (16, 32, 64, 120)
    assert Buckets.make(20, 100, growth=4).decode_rows == (1, 4, 16, 20)


def test_sizes_increase_and_shapes_are_compiled_once():
    for limits in LIMITS:
        buckets = Buckets.make(*limits)
        shapes = buckets.extend_shapes()
        assert len(shapes) == len(set(shapes))
        for sizes in (buckets.decode_rows, buckets.extend_rows, buckets.extend_tokens):
            assert list(sizes) == sorted(set(sizes)) and sizes[0] >= 1


def test_takes_the_smallest_shape():
    buckets = Buckets.make(max_rows=20, max_prefill_tokens=100, growth=2)
    assert buckets.fit(1, 1) == (16, 4) and buckets.fit(5, 5) == (16, 20)
    assert buckets.fit(16, 4) == (16, 4) and buckets.fit(17, 4) == (32, 4)
    assert buckets.fit(20, 20) == (32, 20) and buckets.fit(120, 20) == (120, 20)
    assert [smallest(buckets.decode_rows, count) for count in (1, 3, 8, 17)] == [1, 4, 8, 20]


def test_as_many_tokens_as_rows_are_padded_apart():
    buckets = Buckets.make(max_rows=16, max_prefill_tokens=64, growth=2)
    assert buckets.fit(16, 16) == (32, 16) and (16, 16) not in buckets.extend_shapes()

"""Every step that the scheduler can make has a compiled shape, and no shape is wasted."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.buckets import Buckets

LIMITS = [
    (max_rows, max_prefill_tokens, growth)
    for max_rows in (1, 2, 3, 4, 5, 16, 17, 20)
    for max_prefill_tokens in (1, 2, 7, 16, 40)
    for growth in (2, 3, 4)
]


def steps(max_rows: int, max_prefill_tokens: int):
    """Every (tokens, rows) that a schedule can have: decode rows, and rows of a shared chunk."""
    for decoding in range(max_rows + 1):
        for prefilling in range(max_rows - decoding + 1):
            most = max_prefill_tokens if prefilling else 0
            for prompt_tokens in range(prefilling, most + 1):
                if decoding + prefilling:
                    yield decoding + prompt_tokens, decoding + prefilling


def test_every_step_fits_a_compiled_shape():
    for max_rows, max_prefill_tokens, growth in LIMITS:
        buckets = Buckets.make(max_rows, max_prefill_tokens, growth)
        shapes, sample_rows = set(buckets.forward_shapes()), set(buckets.sample_rows())
        for num_tokens, num_rows in set(steps(max_rows, max_prefill_tokens)):
            padded_tokens, padded_rows = shape = buckets.fit(num_tokens, num_rows)
            assert shape in shapes, f"{num_tokens} tokens of {num_rows} rows: {shape}"
            assert padded_tokens >= num_tokens and padded_rows >= num_rows
            assert padded_rows in sample_rows


@given(st.integers(1, 4096), st.integers(1, 1 << 20), st.sampled_from([2, 4]), st.data())
def test_any_limits_fit(max_rows, max_prefill_tokens, growth, data):
    buckets = Buckets.make(max_rows, max_prefill_tokens, growth)
    num_rows = data.draw(st.integers(1, max_rows))
    num_tokens = data.draw(st.integers(num_rows, num_rows - 1 + max_prefill_tokens))
    assert buckets.fit(num_tokens, num_rows) in buckets.forward_shapes()


def test_every_number_of_admitted_requests_has_a_patch():
    for limits in LIMITS:
        assert max(Buckets.make(*limits).patch_rows) == limits[0]


def test_sizes_grow_by_the_factor_up_to_the_limit():
    buckets = Buckets.make(max_rows=20, max_prefill_tokens=100, growth=2)
    assert buckets.decode_rows == (1, 2, 4, 8, 16, 20)
    assert buckets.extend_rows == buckets.patch_rows == (4, 20)
    assert buckets.extend_tokens == (16, 32, 64, 120)
    assert Buckets.make(20, 100, growth=4).decode_rows == (1, 4, 16, 20)


def test_shapes_are_compiled_once():
    for limits in LIMITS:
        shapes = Buckets.make(*limits).forward_shapes()
        assert len(shapes) == len(set(shapes))


def test_takes_the_smallest_shape():
    buckets = Buckets.make(max_rows=20, max_prefill_tokens=100, growth=2)
    assert buckets.fit(1, 1) == (1, 1) and buckets.fit(5, 5) == (8, 8)
    assert buckets.fit(20, 20) == (20, 20) and buckets.fit(17, 17) == (20, 20)
    assert buckets.fit(5, 4) == (16, 4) and buckets.fit(17, 4) == (32, 4)
    assert buckets.fit(7, 5) == (16, 20) and buckets.fit(120, 20) == (120, 20)


def test_extend_shape_is_never_a_decode_shape():
    """One token more than rows is no decode step, wherever it is padded to."""
    for limits in LIMITS:
        buckets = Buckets.make(*limits)
        for num_tokens, num_rows in set(steps(*limits[:2])):
            padded_tokens, padded_rows = buckets.fit(num_tokens, num_rows)
            assert (padded_tokens == padded_rows) == (num_tokens == num_rows)

"""Bidirectional attention of packed rows, every implementation, against each row in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention.packed import PLANS

# Lengths: within a tile, at its edge, beyond a block of keys, no token at all.
BATCHES = [([5], 16), ([32, 1, 0, 33], 80), ([130, 7, 64, 65, 0, 0], 300)]
HEADS = [(4, 4), (4, 2)]


def dense_row(q, k, v) -> np.ndarray:
    """One row, f64: q [t, N, H], k and v [t, K, H]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


def run(lengths, q, k, v, implementation: str) -> np.ndarray:
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)

    @jax.jit
    def attend(q, k, v, starts):
        plan = attention.plan_packed(starts, num_tokens=len(q), implementation=implementation)
        return attention.packed_attention(q, k, v, plan)

    return np.asarray(attend(q, k, v, starts))


def draw(num_tokens, num_heads, num_kv_heads) -> list[np.ndarray]:
    rng = np.random.default_rng(num_tokens)
    sizes = num_heads, num_kv_heads, num_kv_heads
    return [rng.standard_normal((num_tokens, n, 16)).astype(np.float32) for n in sizes]


@pytest.mark.parametrize("implementation", PLANS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths, num_tokens", BATCHES)
def test_each_row_sees_all_of_itself_and_nothing_else(lengths, num_tokens, heads, implementation):
    q, k, v = draw(num_tokens, *heads)
    end = sum(lengths)
    for x in (q, k, v):
        x[end:] = np.nan  # padding
    out = run(lengths, q, k, v, implementation)
    assert not out[end:].any(), "padding gets zeros"
    cuts = np.cumsum(lengths)[:-1]
    rows = zip(*(np.split(x[:end], cuts) for x in (q, k, v, out)), strict=True)
    for row_q, row_k, row_v, found in rows:
        if len(row_q):
            np.testing.assert_allclose(found, dense_row(row_q, row_k, row_v), atol=2e-6)


@pytest.mark.parametrize("implementation", PLANS)
def test_nan_of_one_row_reaches_no_other(implementation):
    lengths = [5, 6, 7]
    q, k, v = draw(32, 4, 4)
    clean = run(lengths, q, k, v, implementation)
    for x in (q, k, v):
        x[5:11] = np.nan
    spoilt = run(lengths, q, k, v, implementation)
    others = np.r_[0:5, 11:32]
    np.testing.assert_array_equal(spoilt[others], clean[others])
    assert np.isnan(spoilt[5:11]).all()


def test_cost_is_not_the_square_of_the_whole_step():
    """No array of a step with many rows has as many numbers as T * T scores."""
    num_tokens = 2048
    starts = jnp.arange(0, num_tokens + 1, 64, dtype=jnp.int32)
    q, k, v = draw(num_tokens, 4, 4)

    def attend(q, k, v):
        plan = attention.plan_packed(starts, num_tokens=num_tokens)
        return attention.packed_attention(q, k, v, plan)

    scratch = jax.jit(attend).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    print(f"{scratch / 1e6:.1f} MB of scratch; the scores alone would take {4 * 4 * 2048**2 / 1e6}")
    assert scratch < 4 * 4 * num_tokens**2 / 4


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="choose from"):
        attention.plan_packed(jnp.zeros(2, jnp.int32), num_tokens=4, implementation="best")

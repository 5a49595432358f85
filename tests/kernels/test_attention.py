"""Paged attention, every implementation, against attention written out per row in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention

IMPLEMENTATIONS = ["reference", "triton-interpret", "batch-invariant"]
if jax.default_backend() == "gpu":
    IMPLEMENTATIONS.append("triton")


def dense_row(q, k, v, window):
    """The last len(q) queries of one row, f64: q [t, N, H], k and v [s, K, H]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
    query = np.arange(len(k) - len(q), len(k))[:, None]
    key = np.arange(len(k))[None]
    visible = (key <= query) & (key > query - (window or 10**9))
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


def make_case(rows, *, page_size, num_heads, num_kv_heads, head_dim, num_rows, num_tokens, seed=0):
    """rows: (query_len, seq_len) pairs. Unwritten slots of the cache hold NaN."""
    rng = np.random.default_rng(seed)
    num_layers, layer = 3, 1
    pages_per_row = max(-(-seq // page_size) for _, seq in rows) + 1
    num_pages = 1 + len(rows) * pages_per_row
    shape = attention.kv_cache_shape(
        num_layers=num_layers,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    pools = [np.full(shape, np.nan, np.float32) for _ in "kv"]
    order = rng.permutation(np.arange(1, num_pages))
    table = np.zeros((num_rows, pages_per_row), np.int32)
    queries, expected, seq_lens = [], [], np.zeros(num_rows, np.int32)
    starts = np.zeros(num_rows + 1, np.int32)
    for i, (query_len, seq_len) in enumerate(rows):
        table[i] = order[i * pages_per_row : (i + 1) * pages_per_row]
        k, v = rng.standard_normal((2, seq_len, num_kv_heads, head_dim)).astype(np.float32)
        slot = np.arange(seq_len)
        pages = table[i][slot // page_size] + layer * num_pages
        for pool, new in zip(pools, (k, v), strict=True):
            pool[pages, :, slot % page_size] = new
        q = rng.standard_normal((query_len, num_heads, head_dim)).astype(np.float32)
        queries.append(q)
        expected.append((q, k, v))
        seq_lens[i] = seq_len
        starts[i + 1 :] += query_len
    q = np.concatenate(queries)
    q = np.concatenate([q, np.full((num_tokens - len(q), *q.shape[1:]), np.nan, np.float32)])
    batch = attention.RaggedBatch(jnp.array(table), jnp.array(seq_lens), jnp.array(starts))
    cache = attention.KVCache(jnp.array(pools[0]), jnp.array(pools[1]), num_pages)
    return jnp.array(q), cache, jnp.int32(layer), batch, expected


DECODE = [(1, n) for n in (1, 7, 16, 17, 64, 200)]
MIXED = [(1, 5), (1, 90), (40, 40), (3, 3), (17, 120), (1, 33)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
def test_equals_dense_attention(rows, page_size, window, implementation):
    is_decode = rows is DECODE
    q, cache, layer, batch, expected = make_case(
        rows,
        page_size=page_size,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        num_rows=8,
        num_tokens=8 if is_decode else 70,
    )
    plan = attention.plan(batch, cache, num_tokens=len(q), implementation=implementation)
    out = jax.jit(functools.partial(attention.paged_attention, window=window))(
        q, cache, layer, plan
    )
    want = np.concatenate([dense_row(*row, window) for row in expected])
    tolerance = 5e-3 if implementation == "triton" else 2e-6  # TF32 products on a GPU
    np.testing.assert_allclose(out[: len(want)], want, atol=tolerance, rtol=1e-5)
    assert not np.asarray(out[len(want) :]).any(), "padding tokens get zeros"


@pytest.mark.parametrize("head_dim,num_heads,num_kv_heads", [(64, 4, 4), (80, 14, 2), (128, 8, 1)])
def test_head_sizes(head_dim, num_heads, num_kv_heads):
    q, cache, layer, batch, expected = make_case(
        MIXED,
        page_size=16,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_rows=6,
        num_tokens=64,
    )
    out = attention.paged_attention(
        q, cache, layer, attention.plan(batch, cache, num_tokens=len(q))
    )
    want = np.concatenate([dense_row(*row, None) for row in expected])
    np.testing.assert_allclose(out[: len(want)], want, atol=3e-6, rtol=1e-5)


def blocks_of(rows, num_rows, num_tokens) -> int:
    """How many (tile, block) pairs the plan asks for."""
    starts = np.cumsum([0] + [q for q, _ in rows] + [0] * (num_rows - len(rows)))
    batch = attention.RaggedBatch(
        jnp.zeros((num_rows, 64), jnp.int32),
        jnp.array([s for _, s in rows] + [0] * (num_rows - len(rows)), jnp.int32),
        jnp.array(starts, jnp.int32),
    )
    cache = attention.empty_kv_cache((2, 1, 16, 8), 2, jnp.float32)
    plan = attention.plan(batch, cache, num_tokens=num_tokens, implementation="reference")
    return int(plan.details.block_end[-1])


def test_cost_follows_the_tokens_that_are_there():
    short, long = (1, 64), (1, 64 * 64)
    assert blocks_of([short] * 16, 16, 16) == 16
    assert blocks_of([short] * 15 + [long], 16, 16) == 15 + 64, "not 16 times the longest"
    assert blocks_of([short] * 4, 16, 16) == 4, "padding rows cost nothing"
    tiles_256 = blocks_of([(16, 16)] * 256, 256, 4096)
    assert tiles_256 == 256, "linear in the batch"
    assert blocks_of([(64, 1024)], 4, 64) == 4 * 16, "a tile stops at its last query's position"


def test_write_kv_touches_one_layer_and_sends_padding_to_the_trash_page():
    cache = attention.empty_kv_cache((2 * 4, 1, 2, 3), 4, jnp.float32)
    k = jnp.arange(1.0, 10.0).reshape(3, 1, 3)
    slots = jnp.array([2 * 2 + 1, 3 * 2 + 0, 0], jnp.int32)
    cache = attention.write_kv(cache, jnp.int32(1), k, -k, slots)
    pages = np.asarray(cache.k)
    assert not pages[:4].any(), "layer 0 is untouched"
    assert (pages[4 + 2, 0, 1] == [1, 2, 3]).all() and (pages[4 + 3, 0, 0] == [4, 5, 6]).all()
    assert (pages[4 + 0, 0, 0] == [7, 8, 9]).all(), "padding"
    assert np.count_nonzero(pages) == 9
    np.testing.assert_array_equal(pages, -np.asarray(cache.v))


@pytest.mark.parametrize(
    "q_shape,window,words",
    [
        ((2, 3, 4), None, "3 query heads are no multiple of 2"),
        ((2, 2, 8), None, "head_dim 8, the cache has 4"),
        ((2, 2, 4), 0, "window=0"),
    ],
)
def test_refuses_what_does_not_fit(q_shape, window, words):
    cache = attention.empty_kv_cache((4, 2, 2, 4), 4, jnp.float32)
    with pytest.raises(ValueError, match=words):
        plan = attention.Plan(details=None, implementation="reference")
        attention.paged_attention(jnp.zeros(q_shape), cache, jnp.int32(0), plan, window=window)


def test_unknown_implementation_names_the_known_ones():
    ints = jnp.zeros((1, 1), jnp.int32)
    batch = attention.RaggedBatch(ints, ints[0], jnp.zeros(2, jnp.int32))
    cache = attention.empty_kv_cache((2, 1, 16, 8), 2, jnp.float32)
    with pytest.raises(ValueError, match="'nope': choose from"):
        attention.plan(batch, cache, num_tokens=1, implementation="nope")

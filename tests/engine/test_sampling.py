"""The jitted sampler against distributions written out in NumPy. Seeds are fixed: no luck."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxserve import sampling
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.step_plan import pack_sampling

NUM_DRAWS = 20_000
LOGITS = np.array([1.2, -0.7, 3.0, 2.9, 0.1, -4.0, 2.2, 0.1, 1.9, -1.0], np.float32)

sample = jax.jit(sampling.sample)
keep_top = jax.jit(sampling.keep_top)


def pack(seed: int = 0, **fields) -> np.ndarray:
    return pack_sampling(Request("r", [1], SamplingParams.parse(fields), 1, seed))


def draw(logits, packed, positions) -> np.ndarray:
    """One token per row; one line of `logits` or of `packed` serves all rows."""
    positions = np.asarray(positions, np.int32)
    logits = np.broadcast_to(logits, (len(positions), np.shape(logits)[-1]))
    packed = np.broadcast_to(packed, (len(positions), np.shape(packed)[-1]))
    return np.asarray(sample(jnp.array(logits), jnp.array(packed), jnp.array(positions)))


def reference(logits, temperature=1.0, top_k=-1, top_p=1.0) -> np.ndarray:
    """Probabilities: top-k and top-p both cut the full distribution, sorted."""
    scaled = np.asarray(logits, np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    is_kept = before <= top_p
    if top_k > 0:
        is_kept &= np.arange(len(order)) < top_k
    lowest = probabilities[order][is_kept].min()
    probabilities[probabilities < lowest] = 0
    return probabilities / probabilities.sum()


def assert_drawn_from(tokens: np.ndarray, expected: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any(), "a token that was cut"
    wanted = expected[expected > 0] * len(tokens)
    chi_square = ((counts[expected > 0] - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, f"{counts} instead of {wanted.round()}"


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_k": 2, "top_p": 0.95},
    {"top_k": 7, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.8},
    {"temperature": 0.3, "top_p": 0.8},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_tokens_of_all_positions_have_the_distribution(fields):
    tokens = draw(LOGITS, pack(seed=1, **fields), np.arange(NUM_DRAWS))
    assert_drawn_from(tokens, reference(LOGITS, **fields))


@pytest.mark.parametrize("fields", [{}, {"temperature": 2.0, "top_k": 6, "top_p": 0.8}], ids=str)
def test_tokens_of_all_seeds_have_the_distribution(fields):
    packed = np.stack([pack(seed, **fields) for seed in range(NUM_DRAWS)])
    tokens = draw(LOGITS, packed, np.full(NUM_DRAWS, 7))
    assert_drawn_from(tokens, reference(LOGITS, **fields))


def test_next_token_does_not_depend_on_the_last():
    tokens = draw(np.zeros(4, np.float32), pack(), np.arange(NUM_DRAWS))
    pairs = tokens[:-1] * 4 + tokens[1:]
    assert_drawn_from(pairs, np.full(16, 1 / 16))


def test_shapes_are_checked_here():
    """By tests/conftest.py: in production nobody pays for it."""
    with pytest.raises(jaxtyping.TypeCheckError):
        sampling.greedy(jnp.zeros(3))


def test_greedy_takes_the_best():
    logits = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    tokens = np.asarray(jax.jit(sampling.greedy)(logits))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    assert tokens.dtype == np.int32


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 5.0, "top_k": 1}])
def test_greedy_rows_stay_greedy_beside_sampled_ones(fields):
    logits = np.random.default_rng(0).standard_normal((200, 30)).astype(np.float32)
    packed = np.stack([pack(temperature=3.0), pack(**fields)] * 100)
    tokens = draw(logits, packed, np.arange(200))
    best = logits.argmax(axis=1)
    np.testing.assert_array_equal(tokens[1::2], best[1::2])
    assert (tokens[::2] != best[::2]).mean() > 0.5


def test_token_does_not_depend_on_the_neighbours():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 30)).astype(np.float32)
    rows = [
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 5.0, "top_k": 9, "top_p": 0.5},
    ]
    packed = np.stack([pack(seed=i, **rows[i % len(rows)]) for i in range(8)])
    positions = rng.integers(0, 1000, 8)
    together = draw(logits, packed, positions)
    alone = [draw(logits[i : i + 1], packed[i : i + 1], positions[i : i + 1])[0] for i in range(8)]
    np.testing.assert_array_equal(together, alone)
    shuffled = rng.permutation(8)
    tokens = draw(logits[shuffled], packed[shuffled], positions[shuffled])
    np.testing.assert_array_equal(tokens, together[shuffled])


def test_same_seed_and_position_give_the_same_token():
    first, second = (draw(LOGITS, pack(seed=5), np.arange(100)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_every_bit_of_the_seed_counts():
    seeds = [0, *(1 << bit for bit in range(64)), -1]
    packed = np.repeat(np.stack([pack(seed) for seed in seeds]), 20, axis=0)
    positions = np.tile(np.arange(20), len(seeds))
    tokens = draw(np.zeros(50, np.float32), packed, positions).reshape(len(seeds), 20)
    assert len({row.tobytes() for row in tokens}) == len(seeds)


def test_next_seed_is_not_the_next_position():
    flat = np.zeros(50, np.float32)
    this, next_ = (draw(flat, pack(seed), np.arange(50)) for seed in (5, 6))
    assert (this[1:] == next_[:-1]).mean() < 0.2


def kept(logits, top_k=-1, top_p=1.0) -> list[int]:
    row = jnp.array([logits], jnp.float32)
    mask = keep_top(row, jnp.array([top_k], jnp.int32), jnp.array([top_p], jnp.float32))
    return np.flatnonzero(mask[0]).tolist()


# Of these, and of the sums of their halves, the softmax is exact: 1/2, 1/4, 1/8, 1/8.
HALVES = np.log2([4.0, 2.0, 1.0, 1.0]) * np.log(2)


@pytest.mark.parametrize(
    "top_p,tokens",
    [
        (1e-9, [0]),
        (0.499, [0]),
        (0.5, [0, 1]),
        (0.501, [0, 1]),
        (0.749, [0, 1]),
        (0.75, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_a_token_while_the_mass_before_it_is_at_most_p(top_p, tokens):
    assert kept(HALVES, top_p=top_p) == tokens


@pytest.mark.parametrize("top_k,tokens", [(1, [2]), (2, [2, 3]), (3, [2, 3, 6]), (10, range(10))])
def test_top_k_keeps_the_k_best(top_k, tokens):
    assert kept(LOGITS, top_k=top_k) == list(tokens)


def test_top_k_and_top_p_cut_the_full_distribution():
    """Renormalised after top-k, 1/2 and 1/4 would be 2/3 and 1/3, and 0.6 would keep one."""
    assert kept(HALVES, top_k=2, top_p=0.6) == [0, 1]
    assert kept(HALVES, top_k=1, top_p=0.9) == [0]
    assert kept(HALVES, top_k=3, top_p=0.3) == [0]


def test_ties_at_the_boundary_stay_together():
    assert kept([1.0, 2.0, 1.0, 1.0, 0.0], top_k=2) == [0, 1, 2, 3]


def test_top_p_of_one_keeps_all_although_the_masses_do_not_add_up_to_one():
    logits = np.random.default_rng(0).standard_normal((20, 5000)).astype(np.float32) * 3
    mask = keep_top(jnp.array(logits), jnp.full(20, -1, jnp.int32), jnp.ones(20))
    assert mask.all()


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_best_token_always_stays(fields):
    logits = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32) * 5
    options = {"top_k": -1, "top_p": 1.0} | fields
    mask = keep_top(
        jnp.array(logits),
        jnp.full(50, options["top_k"], jnp.int32),
        jnp.full(50, options["top_p"], jnp.float32),
    )
    assert np.asarray(mask)[np.arange(50), logits.argmax(axis=1)].all()


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_extreme_temperatures_draw_tokens(temperature):
    tokens = draw(LOGITS, pack(temperature=temperature), np.arange(1000))
    if temperature < 1:
        assert set(tokens) == {LOGITS.argmax()}
    else:
        assert_drawn_from(tokens, np.full(10, 0.1))

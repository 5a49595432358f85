"""The jitted sampler against distributions written out in NumPy. Seeds are fixed: no luck."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxserve import sampling
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.step_plan import NO_TOKEN, TOPS_PARTS, pack_extras, pack_sampling

NUM_DRAWS = 20_000
LOGITS = np.array([1.2, -0.7, 3.0, 2.9, 0.1, -4.0, 2.2, 0.1, 1.9, -1.0], np.float32)


@jax.jit
def sample(logits, packed, positions):
    rows = sampling.Rows.unpack(packed)
    return sampling.draw(sampling.keep_top(sampling.scale(logits, rows), rows), rows, positions)


def keep_top(logits, packed) -> np.ndarray:
    """Which tokens may be drawn."""
    rows = sampling.Rows.unpack(jnp.tile(packed, (len(logits), 1)))
    kept = jax.jit(sampling.keep_top)(jnp.asarray(logits), rows)
    return np.asarray(kept) > -np.inf


def pack(seed: int = 0, **fields) -> np.ndarray:
    return pack_sampling(Request("r", [1], SamplingParams.parse(fields), 1, seed))


def draw(logits, packed, positions) -> np.ndarray:
    """One token per row; one line of `logits` or of `packed` serves all rows."""
    positions = np.asarray(positions, np.int32)
    logits = np.broadcast_to(logits, (len(positions), np.shape(logits)[-1]))
    packed = np.broadcast_to(packed, (len(positions), np.shape(packed)[-1]))
    return np.asarray(sample(jnp.array(logits), jnp.array(packed), jnp.array(positions)))


def reference(logits, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0) -> np.ndarray:
    """Probabilities: top-k, top-p and min-p all cut the full distribution, sorted."""
    scaled = np.asarray(logits, np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    is_kept = before <= top_p
    if top_k > 0:
        is_kept &= np.arange(len(order)) < top_k
    is_kept &= probabilities[order] >= min_p * probabilities.max()
    lowest = probabilities[order][is_kept].min()
    probabilities[probabilities < lowest] = 0
    return probabilities / probabilities.sum()


def assert_drawn_from(tokens: np.ndarray, expected: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any(), "a token that was cut"
    wanted = expected[expected > 0] * len(tokens)
    chi_square = ((counts[expected > 0] - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5, f"{counts} instead of {wanted.round()}"


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
    {"min_p": 0.3},
    {"min_p": 0.9},
    {"temperature": 3.0, "min_p": 0.2, "top_p": 0.95, "top_k": 8},
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


def kept(logits, **fields) -> list[int]:
    return np.flatnonzero(keep_top(np.float32([logits]), pack(**fields))[0]).tolist()


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
    assert keep_top(logits, pack()).all()


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_best_token_always_stays(fields):
    logits = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32) * 5
    mask = keep_top(logits, pack(**fields))
    assert mask[np.arange(50), logits.argmax(axis=1)].all()


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_extreme_temperatures_draw_tokens(temperature):
    tokens = draw(LOGITS, pack(temperature=temperature), np.arange(1000))
    if temperature < 1:
        assert set(tokens) == {LOGITS.argmax()}
    else:
        assert_drawn_from(tokens, np.full(10, 0.1))


# Bias, penalties and the least length.


def adjusted(logits, counts, banned=(), position=50, prompt_length=1, **fields) -> np.ndarray:
    """The scores of one row whose output holds each token `counts` times."""
    fields = SamplingParams.parse(fields)
    request = Request("r", [1] * prompt_length, fields, 128, 0)
    rows = sampling.Rows.unpack(jnp.asarray(pack_sampling(request)[None]))
    extras = pack_extras(0, request, banned)[None, 1:]
    extras = sampling.Extras.unpack(jnp.asarray(extras), rows.has_extras)
    lines = jnp.float32([logits]), jnp.int32([counts])
    return np.asarray(jax.jit(sampling.adjust)(*lines, rows, extras, jnp.int32([position]))[0])


COUNTS = [0, 1, 5, 0, 2, 0, 0, 1, 0, 3]
PENALTIES = [
    {},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -2.0},
    {"presence_penalty": 1.3},
    {"presence_penalty": -0.4},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"logit_bias": {"0": 3.5, "9": -100.0}},
    {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "logit_bias": {"4": 1.0},
    },
]


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
def test_scores_are_penalised_by_the_output_so_far(fields):
    expected, counts = LOGITS.astype(np.float64), np.array(COUNTS)
    repetition = fields.get("repetition_penalty", 1.0)
    penalised = np.where(expected > 0, expected / repetition, expected * repetition)
    expected = np.where(counts > 0, penalised, expected)
    expected -= fields.get("frequency_penalty", 0) * counts
    expected -= fields.get("presence_penalty", 0) * (counts > 0)
    for token, bias in fields.get("logit_bias", {}).items():
        expected[int(token)] += bias
    np.testing.assert_allclose(adjusted(LOGITS, COUNTS, **fields), expected, rtol=1e-6)


def test_without_options_scores_keep_every_bit():
    """The same row draws the same token beside neighbours that ask for more."""
    np.testing.assert_array_equal(adjusted(LOGITS, COUNTS), LOGITS)


@pytest.mark.parametrize("position,is_banned", [(3, True), (6, True), (7, False), (50, False)])
def test_no_stop_before_the_least_length(position, is_banned):
    """`position` counts the prompt: of 3 tokens here, and 4 are to follow before a stop."""
    scores = adjusted(
        LOGITS, COUNTS, banned=(2, 5), position=position, prompt_length=3, min_new_tokens=4
    )
    expected = LOGITS.copy()
    expected[[2, 5]] = -np.inf if is_banned else expected[[2, 5]]
    np.testing.assert_array_equal(scores, expected)


def test_extras_of_an_earlier_request_in_the_row_are_not_taken():
    request = Request("r", [1], SamplingParams.parse({"logit_bias": {"3": 9.0}}), 128, 0)
    left = pack_extras(0, request, [5])[None, 1:]
    extras = sampling.Extras.unpack(jnp.asarray(left), jnp.array([False]))
    assert (np.asarray(extras.bias_ids) == NO_TOKEN).all()
    assert (np.asarray(extras.banned_ids) == NO_TOKEN).all()


# Logprobs.


@pytest.mark.parametrize("vocab_size", [10, 300])
def test_tops_hold_the_best_tokens_and_those_asked_for(vocab_size):
    logits = np.random.default_rng(0).standard_normal((4, vocab_size)).astype(np.float32) * 4
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    probe_ids = np.full((4, TOPS_PARTS[2]), NO_TOKEN, np.int32)
    probe_ids[:, :2] = 7, 0
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    packed = np.asarray(jax.jit(sampling.pack_tops)(logprobs, probe_ids))
    ids, values, probes = np.split(packed, np.cumsum(TOPS_PARTS)[:-1], axis=1)
    values, probes = (np.ascontiguousarray(one).view(np.float32) for one in (values, probes))
    count = min(TOPS_PARTS[0], vocab_size)
    np.testing.assert_array_equal(ids[:, :count], np.argsort(-logits, axis=1)[:, :count])
    np.testing.assert_allclose(values[:, :count], -np.sort(-expected, axis=1)[:, :count], atol=1e-5)
    assert (values[:, count:] == -np.inf).all()
    np.testing.assert_allclose(probes[:, :2], expected[:, [7, 0]], atol=1e-5)
    chosen = sampling.logprobs_of(logprobs, jnp.asarray(ids[:, 0]))
    np.testing.assert_array_equal(chosen, values[:, 0])

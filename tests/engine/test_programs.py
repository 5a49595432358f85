"""The compiled programs on a tiny model: where their results go, and what a row's end does."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import compiler
from jaxserve.buckets import Buckets
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.runner import Runner
from jaxserve.state import StateShape
from jaxserve.step_plan import (
    KEEP,
    LAST_TOKEN,
    NOT_FINITE,
    OUT_OF_LENGTH,
    PATCH_HEADER,
    RUNNING,
    SAMPLING_START,
    STOPPED,
    StepPlan,
)

# So many pages that the cache is larger than what an attention over few tokens needs.
MAX_ROWS, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, NUM_STEPS = 2, 4, 4, 1024, 4
WIDTH, TRASH, ROOM = PATCH_HEADER + PAGES_PER_ROW, MAX_ROWS, PAGES_PER_ROW * PAGE_SIZE
PROMPT = [3, 14, 15, 92, 65]
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ROOM,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def compiled() -> Runner:
    return make_runner()


def make_runner(compiler=compiler, runner_type: type[Runner] = Runner) -> Runner:
    config = ModelConfig.from_dict(CONFIG)
    shape = StateShape(
        max_rows=MAX_ROWS,
        pages_per_row=PAGES_PER_ROW,
        max_steps=NUM_STEPS,
        max_tokens=8,
        num_layers=config.num_layers,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=jnp.dtype(config.dtype),
    )
    sizes = (MAX_ROWS,)
    buckets = Buckets(
        decode_rows=sizes,
        extend_rows=sizes,
        extend_tokens=(8,),
        patch_lines=sizes,
        copies=sizes,
        decode_steps=(1, NUM_STEPS),
        scores=4,
    )
    compiled = compiler.compile_programs(*create_model(config), shape, buckets)
    params = create_model(config, key=jax.random.key(0))[1]
    return runner_type(compiled, params, shape, buckets.scores)


@pytest.fixture
def runner(compiled: Runner) -> Runner:
    compiled.reset()
    return compiled


def line(
    row: int, *, seq_len=0, last_token=KEEP, finish=RUNNING, limit=ROOM, stop_ids=(), pages=None
) -> np.ndarray:
    packed = np.zeros(WIDTH, np.int32)
    packed[:5] = row, seq_len, last_token, finish, limit
    packed[5:SAMPLING_START] = -1
    packed[5 : 5 + len(stop_ids)] = stop_ids
    if pages is None:
        pages = [1 + row * PAGES_PER_ROW + i for i in range(PAGES_PER_ROW)]
    packed[PATCH_HEADER : PATCH_HEADER + len(pages)] = pages
    return packed


def patch(*lines: np.ndarray, batch=(0, 1)) -> bytes:
    padding = [line(TRASH, finish=STOPPED, limit=0, pages=[])] * (MAX_ROWS - len(lines))
    batch = [*batch, *[TRASH] * (MAX_ROWS - len(batch))]
    return np.concatenate([*lines, *padding, np.array(batch, np.int32)]).tobytes()


def extend(chunks: dict[int, list[int]], patch: bytes = b"", copies: bytes = b"") -> StepPlan:
    """Every row samples."""
    padding = MAX_ROWS - len(chunks)
    tokens = [token for chunk in chunks.values() for token in chunk]
    forward = [
        *(*chunks, *[TRASH] * padding),
        *(*map(len, chunks.values()), *[0] * padding),
        *(*[1] * len(chunks), *[0] * padding),
        *(*tokens, *[0] * (8 - len(tokens))),
    ]
    packed = np.array(forward, np.int32).tobytes()
    return StepPlan(0, "extend", 8, MAX_ROWS, 1, "greedy", packed, patch, copies=copies)


def decode(num_steps: int = 1, patch: bytes = b"") -> StepPlan:
    return StepPlan(0, "decode", MAX_ROWS, MAX_ROWS, num_steps, "greedy", patch=patch)


def execute(runner: Runner, plan: StepPlan) -> list[list[list[int]]]:
    """By step and row: the token, and what became of the row."""
    drawn = runner.read(runner.dispatch(plan)).drawn
    return [[row[:2] for row in step] for step in drawn]


def column(runner: Runner, name: str, row: int) -> list[int]:
    return np.asarray(getattr(runner._state, name)[row]).tolist()


def kv(runner: Runner) -> np.ndarray:
    """[K and V, layer, page, ...] of the cache."""
    cache = runner._state.kv
    pages = np.stack([np.asarray(cache.k), np.asarray(cache.v)])
    return pages.reshape(2, -1, NUM_PAGES, *pages.shape[2:])


def run_greedy(runner: Runner, num_tokens: int, **fields) -> list[int]:
    """The prompt in row 0, then single decode steps."""
    runner.reset()
    out = execute(runner, extend({0: PROMPT}, patch(line(0, **fields), batch=[0])))
    tokens = [out[0][0][0]]
    return tokens + [execute(runner, decode())[0][0][0] for _ in range(num_tokens - 1)]


# Where results go.


def aliases(text: str) -> dict[int, int]:
    """Output to argument, as the compiled module says."""
    header = re.search(r"input_output_alias=\{(.*?)\}, entry", text.partition("\n")[0])
    found = re.findall(r"\{(\d*)\}: \((\d+), \{\}", header[1])
    return {int(output or 0): int(argument) for output, argument in found}


def test_every_program_leaves_every_leaf_of_the_state_where_it_is(compiled):
    num_leaves = len(jax.tree.leaves(compiled._state))
    assert len(compiled._programs) > 8
    for key, program in compiled._programs.items():
        if key[0] in ("peek", "score"):
            continue
        found = aliases(program.as_text())
        first = found[0]  # after the weights that the program reads
        assert found == {i: first + i for i in range(num_leaves)}, key


def test_a_copy_of_the_output_shares_no_buffer(compiled):
    for key in (("peek", "out"), ("peek", "tops"), ("score", True, True)):
        assert "input_output_alias" not in compiled._programs[key].as_text().partition("\n")[0]


def test_no_program_needs_a_second_cache(compiled):
    cache = compiled._state.kv.k.nbytes
    for key, program in compiled._programs.items():
        assert program.memory_analysis().temp_size_in_bytes < cache, key


def test_buffers_keep_their_addresses(runner):
    def addresses() -> list[int]:
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(runner._state)]

    before = addresses()
    execute(runner, extend({0: PROMPT}, patch(line(0), batch=[0]), copies([(1, 9, 2)])))
    for num_steps in (1, NUM_STEPS):
        execute(runner, decode(num_steps))
    assert addresses() == before


def test_shape_that_was_not_compiled_raises(runner):
    with pytest.raises(KeyError):
        runner.dispatch(decode(num_steps=NUM_STEPS - 1))


# Copies.


def copies(triples: list[tuple[int, int, int]]) -> bytes:
    padding = [(0, 0, 0)] * (MAX_ROWS - len(triples))
    return np.array([*triples, *padding], np.int32).tobytes()


def fill_cache(runner: Runner) -> np.ndarray:
    """Numbers nobody shares; NaN in the last page."""
    cache = runner._state.kv
    k, v = (
        jnp.arange(1, cache.k.size + 1, dtype=cache.k.dtype).reshape(cache.k.shape) * sign
        for sign in (1, -1)
    )
    last = jnp.arange(NUM_PAGES - 1, len(k), NUM_PAGES)
    k, v = (pages.at[last].set(jnp.nan) for pages in (k, v))
    runner._state = dataclasses.replace(runner._state, kv=dataclasses.replace(cache, k=k, v=v))
    return kv(runner)


@pytest.mark.parametrize("kept", range(PAGE_SIZE + 1))
def test_copy_keeps_the_first_tokens_and_zeroes_the_rest_in_all_layers(runner, kept):
    before = fill_cache(runner)
    target = NUM_PAGES - 1  # holds NaN
    runner._run("copy_pages", 2, upload=np.array([[5, target, kept], [0, 0, 0]], np.int32))
    after = kv(runner)
    slots = [axis for axis, size in enumerate(before.shape) if axis > 2 and size == PAGE_SIZE][0]
    source, copied = (np.moveaxis(a, slots, 3) for a in (before[:, :, 5:6], after[:, :, -1:]))
    np.testing.assert_array_equal(copied[:, :, :, :kept], source[:, :, :, :kept])
    assert not copied[:, :, :, kept:].any()
    np.testing.assert_array_equal(after[:, :, 1:-1], before[:, :, 1:-1])


def test_copies_read_before_they_write(runner):
    """A donor may be evicted, and be the target of another copy, within one step."""
    before = fill_cache(runner)
    swap = np.array([[5, 6, PAGE_SIZE], [6, 5, PAGE_SIZE]], np.int32)
    runner._run("copy_pages", 2, upload=swap)
    after = kv(runner)
    np.testing.assert_array_equal(after[:, :, [6, 5]], before[:, :, [5, 6]])


def test_donor_is_copied_before_its_next_owner_writes(runner):
    """Eviction may give a page away in the very step that copies it."""
    alone = run_greedy(runner, 1)
    before = kv(runner)
    both = patch(line(0, pages=[1]), line(1, seq_len=3, pages=[30, 31]))
    out = execute(runner, extend({0: [7, 7, 7], 1: PROMPT[3:]}, both, copies([(1, 30, 3)])))
    after = kv(runner)
    assert not (after[:, :, 1] == before[:, :, 1]).all(), "the next owner has written"
    np.testing.assert_allclose(after[:, :, 30:32], before[:, :, 1:3], rtol=1e-5, atol=1e-6)
    assert out[0][1][0] == alone[0]


def test_request_that_continues_a_copied_page_computes_the_same(runner):
    alone = run_greedy(runner, 3)
    again = patch(line(1, seq_len=4, pages=[1, 20, 21, 22]), batch=[1])
    full = execute(runner, extend({1: PROMPT[4:]}, again))
    assert full[0][1][0] == alone[0]
    partial = patch(line(1, seq_len=2, pages=[30, 31, 32, 33]), batch=[1])
    out = execute(runner, extend({1: PROMPT[2:]}, partial, copies([(1, 30, 2)])))
    assert [out[0][1][0], execute(runner, decode())[0][1][0]] == alone[:2]


# The end of a row.


def test_row_that_finished_is_not_advanced_by_steps_dispatched_before_the_host_knew(runner):
    tokens = run_greedy(runner, 4)
    runner.reset()
    stop = patch(line(0, stop_ids=[tokens[1]]), line(1), batch=[0, 1])
    execute(runner, extend({0: PROMPT, 1: PROMPT[:3]}, stop))
    assert execute(runner, decode())[0][0] == [tokens[1], STOPPED]
    seq_len, before = column(runner, "seq_len", 0), kv(runner)
    other = column(runner, "seq_len", 1)
    execute(runner, decode())
    execute(runner, decode(NUM_STEPS))
    execute(runner, extend({0: [LAST_TOKEN], 1: [LAST_TOKEN]}))
    assert column(runner, "seq_len", 0) == seq_len == len(PROMPT) + 1
    assert column(runner, "last_token", 0) == tokens[1]
    assert column(runner, "finish", 0) == STOPPED
    assert column(runner, "seq_len", 1) == other + 1 + NUM_STEPS + 1, "the other goes on"
    own = slice(1, 1 + PAGES_PER_ROW)
    np.testing.assert_array_equal(kv(runner)[:, :, own], before[:, :, own])


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 3])
def test_limit_ends_a_row(runner, max_new_tokens):
    limit = len(PROMPT) + max_new_tokens - 1
    out = execute(runner, extend({0: PROMPT}, patch(line(0, limit=limit), batch=[0])))
    finishes = [out[0][0][1]]
    for _ in range(max(max_new_tokens - 1, 0)):
        finishes.append(execute(runner, decode())[0][0][1])
    assert finishes == [RUNNING] * (len(finishes) - 1) + [OUT_OF_LENGTH]


def test_scores_that_are_not_finite_end_a_row_and_no_other(runner):
    both = patch(line(0), line(1))
    execute(runner, extend({0: PROMPT[:4], 1: PROMPT[:4]}, both))
    cache = runner._state.kv
    pages = cache.v.at[1].set(jnp.nan)
    runner._state = dataclasses.replace(runner._state, kv=dataclasses.replace(cache, v=pages))
    out = execute(runner, decode())
    assert [finish for _, finish in out[0][:2]] == [NOT_FINITE, RUNNING]


def test_pages_that_held_what_is_not_finite_can_be_used_again(runner):
    alone = run_greedy(runner, 3)
    runner.reset()
    cache = runner._state.kv
    k, v = (jnp.full_like(pages, jnp.nan) for pages in (cache.k, cache.v))
    runner._state = dataclasses.replace(runner._state, kv=dataclasses.replace(cache, k=k, v=v))
    out = execute(runner, extend({0: PROMPT}, patch(line(0), batch=[0])))
    assert [out[0][0], *(execute(runner, decode())[0][0] for _ in range(2))] == [
        [token, RUNNING] for token in alone
    ]


def test_padding_writes_to_the_trash_page_alone(runner):
    lengths = {0: 3, 1: 2}
    chunks = {row: PROMPT[:length] for row, length in lengths.items()}
    execute(runner, extend(chunks, patch(line(0), line(1))))
    together = kv(runner)
    for row in lengths:
        runner.reset()
        execute(runner, extend({row: chunks[row]}, patch(line(row), batch=[row])))
        page = 1 + row * PAGES_PER_ROW
        alone = kv(runner)[:, :, page]
        np.testing.assert_allclose(together[:, :, page], alone, rtol=1e-5, atol=1e-6)
        together[:, :, page] = 0
    assert not together[:, :, 1:].any()
    assert together[:, :, 0].any(), "padding has been written"


def test_trash_row_never_runs(runner):
    execute(runner, extend({0: PROMPT}, patch(line(0), batch=[0])))
    execute(runner, decode(NUM_STEPS))
    assert column(runner, "finish", TRASH) == STOPPED
    assert column(runner, "seq_len", TRASH) == 0


# Several steps in one dispatch.


def test_several_decode_steps_equal_as_many_single_ones(runner):
    alone = run_greedy(runner, 1 + 2 * NUM_STEPS)
    seq_len, expected = column(runner, "seq_len", 0), kv(runner)
    runner.reset()
    first = execute(runner, extend({0: PROMPT}, patch(line(0), batch=[0])))
    tokens = [first[0][0][0]]
    for _ in range(2):
        tokens += [step[0][0] for step in execute(runner, decode(NUM_STEPS))]
    assert tokens == alone and column(runner, "seq_len", 0) == seq_len
    np.testing.assert_allclose(kv(runner)[:, :, 1:5], expected[:, :, 1:5], rtol=1e-5, atol=1e-6)


def test_stop_among_several_decode_steps_is_the_last_token(runner):
    tokens = run_greedy(runner, 1 + NUM_STEPS)
    stop = next(i for i in range(1, NUM_STEPS) if tokens[i] not in tokens[:i])
    runner.reset()
    stopping = patch(line(0, stop_ids=[tokens[stop]]), batch=[0])
    execute(runner, extend({0: PROMPT}, stopping))
    out = [step[0] for step in execute(runner, decode(NUM_STEPS))]
    assert out[:stop] == [
        *[[token, RUNNING] for token in tokens[1:stop]],
        [tokens[stop], STOPPED],
    ]
    assert column(runner, "seq_len", 0) == len(PROMPT) + stop
    assert column(runner, "last_token", 0) == tokens[stop]


# Patches.


def test_patch_keeps_what_it_does_not_know(runner):
    execute(runner, extend({0: PROMPT}, patch(line(0, limit=len(PROMPT)), batch=[0])))
    known = {name: column(runner, name, 0) for name in ("seq_len", "last_token", "finish")}
    keep = line(0, seq_len=KEEP, last_token=KEEP, finish=KEEP, limit=9, stop_ids=[7], pages=[9, 8])
    execute(runner, decode(patch=patch(keep, batch=[1])))
    assert {name: column(runner, name, 0) for name in known} == known
    assert column(runner, "limit", 0) == 9 and column(runner, "stop_ids", 0)[:2] == [7, -1]
    assert column(runner, "page_table", 0) == [9, 8, 0, 0]
    assert np.asarray(runner._state.batch).tolist() == [1, TRASH]


def test_patch_sets_what_it_knows(runner):
    new = line(1, seq_len=3, last_token=11, finish=OUT_OF_LENGTH)
    execute(runner, decode(patch=patch(new, batch=[])))
    assert [column(runner, name, 1) for name in ("seq_len", "last_token", "finish")] == [
        3,
        11,
        OUT_OF_LENGTH,
    ]
    assert column(runner, "seq_len", 0) == 0, "other rows stay as they are"


def test_row_is_used_again_after_its_request_has_ended(runner):
    alone = run_greedy(runner, 2)
    runner.reset()
    execute(runner, extend({0: PROMPT[:2]}, patch(line(0, limit=2), batch=[0])))
    assert column(runner, "finish", 0) == OUT_OF_LENGTH
    again = patch(line(0, pages=[40, 41]), batch=[0])
    out = execute(runner, extend({0: PROMPT}, again))
    assert [out[0][0][0], execute(runner, decode())[0][0][0]] == alone

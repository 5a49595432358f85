"""Vectors of the whole engine against transformers: alone, batched, in chunks, behind a prefix."""

import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jaxserve import Engine
from tests.golden.pooled.cases import CASES, NUM_SHARED, Case
from tests.golden.pooled.encoders import ENCODER_CASES
from tests.golden.pooled.golden import FOLDER, Golden, read_golden
from tests.server.serving import programs_folder

PREFILL = re.compile(r"Prefill batch\. #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)")
CHUNK = 12  # with a token of each of four rows the smallest bucket: one program
COSINE = 1 - 1e-5  # measured on a CPU: at least 1 - 4e-7
CLOSE = 5e-5  # of the largest number
RELATIVE = 1e-4  # of a score; measured on a CPU: at most 2.7e-6


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def golden(case) -> Golden:
    return read_golden(case.name)


@pytest.fixture(scope="module")
def engine(case, golden, tmp_path_factory, pytestconfig) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp(case.name)
    digest = case.write(folder)
    assert digest == golden.checkpoint, "made from another checkpoint: see tests/golden/README.md"
    with Engine(
        model_path=str(folder),
        is_embedding=not case.is_scored,
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        chunked_prefill_size=CHUNK,
        max_running_requests=4,
        compilation_cache_dir=programs_folder(pytestconfig),
    ) as engine:
        yield engine
    jax.clear_caches()


@pytest.fixture
def steps(engine, caplog) -> Iterator:
    """Of what follows: new sequences, new tokens, cached tokens of each step with prompts."""
    assert engine.flush_cache()
    caplog.set_level("INFO", logger="jaxserve")
    caplog.clear()

    def found() -> list[tuple[int, ...]]:
        lines = (PREFILL.search(record.getMessage()) for record in caplog.records)
        return [tuple(map(int, line.groups())) for line in lines if line]

    return found


def encode(engine: Engine, prompts) -> np.ndarray:
    answers = engine.encode(input_ids=[prompt.tolist() for prompt in prompts])
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == list(map(len, prompts))
    return np.array([answer["embedding"] for answer in answers], np.float32)


def check(case: Case, vectors: np.ndarray, expected: np.ndarray) -> None:
    assert vectors.shape == expected.shape
    if case.is_scored:
        error = (abs(vectors - expected) / abs(expected).max(axis=-1, keepdims=True)).max()
        print(f"relative error {error:.1e}")
        assert error < RELATIVE
        return
    norms = np.linalg.norm(vectors, axis=-1)
    cosines = (vectors * expected).sum(-1) / norms / np.linalg.norm(expected, axis=-1)
    print(f"1 - cosine at most {1 - cosines.min():.1e}, lengths {norms}")
    assert cosines.min() >= COSINE
    # And number by number: a cosine does not notice an approximate GELU.
    error = abs(vectors - expected).max() / abs(expected).max()
    print(f"largest difference {error:.1e} of the largest number")
    assert error < CLOSE
    np.testing.assert_allclose(norms, np.linalg.norm(expected, axis=-1), rtol=1e-5)


def test_one_at_a_time(case, golden, engine, steps):
    vectors = []
    for prompt in golden.prompts:
        engine.flush_cache()
        vectors.append(encode(engine, [prompt])[0])
    assert sum(tokens for _, tokens, _ in steps()) == sum(map(len, golden.prompts))
    check(case, np.stack(vectors), golden.vectors)


def test_batched_and_in_chunks(case, golden, engine, steps):
    prompts = [*golden.prompts, *golden.prompts[::-1]]
    vectors = encode(engine, prompts)
    most = max(sequences for sequences, _, _ in steps())
    print(f"{list(map(len, prompts))} tokens in {len(steps())} steps, up to {most} texts in one")
    assert len(steps()) > sum(map(len, golden.prompts)) // CHUNK > 1 and most > 1
    check(case, vectors, np.concatenate([golden.vectors, golden.vectors[::-1]]))
    assert engine.flush_cache(), "every row and page is free again"


def test_behind_a_cached_prefix(case, golden, engine, steps):
    """The second and the third prompt begin alike; then all is there but the last token."""
    _, first, second = golden.prompts
    vectors = [encode(engine, [prompt])[0] for prompt in (first, second, second)]
    cached = [step[2] for step in steps() if step[2]]
    print(f"cached tokens: {cached}")
    needs_all = case.mode in ("mean", "cls", "max")
    assert cached == ([] if needs_all else [NUM_SHARED, len(second) - 1])
    check(case, np.stack(vectors), golden.vectors[[1, 2, 2]])


def test_every_case_has_a_golden_and_every_golden_a_case():
    cases = [*CASES, *ENCODER_CASES]
    assert sorted(case.name for case in cases) == sorted(path.stem for path in FOLDER.glob("*.npz"))

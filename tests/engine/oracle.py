"""What a request must be answered: the model run densely over the whole text, no pages, no batch.

Tokens are compared without a tolerance, so none may hang on the last bits: each must be drawn as
well when it has less of a lead, and when filters cut a little earlier or later. Requests for which
that does not hold are not asked: `Oracle.pick` takes another prompt and seed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve import sampling as sampling_ops
from jaxserve.models.config import ModelConfig
from jaxserve.models.interface import CausalAttention
from jaxserve.models.registry import create_model
from jaxserve.models.weights import Checkpoint, load_params
from jaxserve.request import FinishReason, Logprobs, Request, RequestUpdate
from jaxserve.step_plan import NUM_BANNED, pack_extras, pack_sampling
from jaxserve.stop_checker import StopChecker
from tests.golden.golden import CLOSE

MOST_TOKENS, MOST_OUTPUT = 256, 32
MOST_TAKES = 20
LOGPROBS_CLOSE = 1e-4


@dataclasses.dataclass
class Answer:
    """What the engine has told of a request, update by update."""

    request: Request
    ids: list[int] = dataclasses.field(default_factory=list)
    told: list[Logprobs] = dataclasses.field(default_factory=list)
    prompt_told: list[Logprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    num_retractions: int = 0

    def take(self, update: RequestUpdate) -> None:
        assert self.finish_reason is None, "nothing follows the end"
        self.ids += update.token_ids
        self.told += [update.logprobs] if update.logprobs else []
        self.prompt_told += [update.prompt_logprobs] if update.prompt_logprobs else []
        self.finish_reason = update.finish_reason
        self.cached_tokens, self.num_retractions = update.cached_tokens, update.num_retractions


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of one text, a prompt and an output."""

    drawn: np.ndarray  # i32[N] after each prefix of the output
    is_sure: np.ndarray  # bool[N]
    logprobs: np.ndarray  # f32[N, V] that each was drawn from
    prompt_logprobs: np.ndarray  # f32[T, V] after each token of the text


class Oracle:
    def __init__(self, folder: str):
        self.config = dataclasses.replace(
            ModelConfig.from_pretrained(folder, None, {}), dtype="float32"
        )
        self.graphdef, abstract = create_model(self.config)
        self.params = load_params(Checkpoint(folder), abstract)
        self._run = jax.jit(self._score)
        self._known: dict[bytes, Expected] = {}

    def check(self, answer: Answer) -> None:
        """Raises AssertionError where the engine's answer is not the model's."""
        request, ids = answer.request, answer.ids
        expected = self.expect(request, ids)
        count = len(ids)
        assert ids == expected.drawn[:count].tolist(), f"{request.rid}: {request.sampling}"
        assert expected.is_sure[:count].all(), f"{request.rid}: too close to call"
        self._check_end(answer)
        if request.logprobs is None:
            assert not answer.told and not answer.prompt_told
            return
        _check_told(request, answer.told, ids, expected.logprobs[:count])
        first = min(request.logprobs.start + 1, len(request.prompt_ids))
        before = expected.prompt_logprobs[first - 1 : len(request.prompt_ids) - 1]
        _check_told(request, answer.prompt_told, request.prompt_ids[first:], before)

    def pick(self, make: Callable[[int], Request], ask: Callable[[Request], Answer]) -> Request:
        """The first of `make(0)`, `make(1)`, ... whose tokens all have a clear lead."""
        for take in range(MOST_TAKES):
            request = make(take)
            ids = ask(request).ids
            if self.expect(request, ids).is_sure[: len(ids)].all():
                return request
        raise AssertionError(f"{MOST_TAKES} takes are too close to call, or answered wrongly")

    def expect(self, request: Request, ids: list[int]) -> Expected:
        text = [*request.prompt_ids, *ids]
        assert len(text) <= MOST_TOKENS and len(ids) <= MOST_OUTPUT
        padded = np.zeros(MOST_TOKENS + MOST_OUTPUT, np.int32)
        padded[: len(text)] = text
        stop_ids = self._stop_checker(request).stop_ids[:NUM_BANNED]
        sampling, extras = pack_sampling(request), pack_extras(0, request, stop_ids)[1:]
        key = b"".join([padded.tobytes(), sampling.tobytes(), extras.tobytes()])
        if key not in self._known:
            num_prompt = np.int32(len(request.prompt_ids))
            scored = self._run(self.params, padded, num_prompt, sampling, extras)
            self._known[key] = Expected(*map(np.asarray, scored))
        return self._known[key]

    def _score(self, params, text, num_prompt, sampling, extras) -> tuple[jax.Array, ...]:
        model = nnx.merge(self.graphdef, params)
        positions = jnp.arange(MOST_TOKENS, dtype=jnp.int32)
        hidden, _ = model(text[:MOST_TOKENS], positions, CausalAttention())
        logits = model.logits(hidden)

        positions = num_prompt + jnp.arange(MOST_OUTPUT, dtype=jnp.int32)
        scores = logits[jnp.minimum(positions, MOST_TOKENS) - 1]
        output = jax.nn.one_hot(text[positions], scores.shape[1], dtype=jnp.int32)
        counts = jnp.cumsum(output, axis=0) - output  # of what came before
        rows = sampling_ops.Rows.unpack(jnp.tile(sampling, (MOST_OUTPUT, 1)))
        extras = sampling_ops.Extras.unpack(jnp.tile(extras, (MOST_OUTPUT, 1)), rows.has_extras)
        adjusted = sampling_ops.adjust(scores, counts, rows, extras, positions)
        scaled = sampling_ops.scale(adjusted, rows)
        drawn, is_sure = _draw_surely(scaled, rows, positions)
        return drawn, is_sure, jax.nn.log_softmax(scaled), jax.nn.log_softmax(logits)

    def _stop_checker(self, request: Request) -> StopChecker:
        return StopChecker(request, frozenset(self.config.eos_token_ids), None)

    def _check_end(self, answer: Answer) -> None:
        if answer.request.max_new_tokens == 0:
            assert not answer.ids and answer.finish_reason == FinishReason("length", length=0)
            return
        checker = self._stop_checker(answer.request)
        reasons = [checker.push(token) for token in answer.ids]
        assert reasons[:-1] == [None] * (len(reasons) - 1), "nothing was drawn after the end"
        assert answer.finish_reason == reasons[-1] is not None


def _draw_surely(scaled: jax.Array, rows: sampling_ops.Rows, positions: jax.Array):
    """The tokens, and of each whether it would be drawn from slightly other scores too."""

    def draw(by: int, handicapped: jax.Array | None = None) -> jax.Array:
        """`by` 1 keeps a little more than the request asks, -1 a little less."""
        varied = rows._replace(
            top_k=jnp.where(rows.top_k > 1, rows.top_k + by, rows.top_k),
            top_p=jnp.where(rows.top_p < 1, rows.top_p * (1 + by * CLOSE), rows.top_p),
            min_p=rows.min_p * (1 - by * CLOSE),
        )
        kept = sampling_ops.keep_top(scaled, varied)
        if handicapped is not None:
            kept = kept.at[jnp.arange(len(kept)), handicapped].add(-CLOSE)
        return sampling_ops.draw(kept, varied, positions)

    drawn = draw(0)
    return drawn, (draw(-1) == drawn) & (draw(1, drawn) == drawn)


def _check_told(
    request: Request, told: list[Logprobs], tokens: list[int], expected: np.ndarray
) -> None:
    """`expected[i]` is what `tokens[i]` comes from."""
    chosen = [value for part in told for value in part.chosen]
    line = np.arange(len(tokens))
    np.testing.assert_allclose(chosen, expected[line, tokens], atol=LOGPROBS_CLOSE)
    if count := request.logprobs.top_num:
        tops = [top for part in told for top in part.tops]
        values = np.array([[value for value, _ in top] for top in tops]).reshape(-1, count)
        ids = np.array([[token for _, token in top] for top in tops], int).reshape(-1, count)
        best = -np.sort(-expected, axis=1)[:, :count]
        np.testing.assert_allclose(values, best, atol=LOGPROBS_CLOSE)
        np.testing.assert_allclose(values, expected[line[:, None], ids], atol=LOGPROBS_CLOSE)
    if asked := list(request.logprobs.token_ids):
        probes = np.array([probe for part in told for probe in part.probes])
        probes = probes.reshape(-1, len(asked))
        np.testing.assert_allclose(probes, expected[:, asked], atol=LOGPROBS_CLOSE)

"""--deterministic: what a request gets is the same to the bit however it is served, and as the
training forward has it.

Nothing here has a tolerance but gradients. `alone` is the simplest way to serve each request; each
test is one way in which they are served differently, and asserts that it did happen.
"""

import argparse
import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import SamplingBatch, flags, make_step
from jaxserve.config import EngineConfig
from jaxserve.models import batch_invariant
from jaxserve.models.batch_invariant import COMPILER_OPTIONS
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.forward import served_logprobs, token_logprobs
from jaxserve.models.registry import create_model
from jaxserve.models.weights import load_params
from jaxserve.request import Request
from tests.engine.cast import make, prompt_of
from tests.engine.lab import Lab, Setting
from tests.engine.oracle import MOST_TOKENS, Answer, Oracle
from tests.golden.random_checkpoint import write_checkpoint
from tests.server.serving import DEMO_MODEL, programs_folder

# No size is a multiple of 8: what XLA vectorises has a rest everywhere.
ODD = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 331,
    "hidden_size": 70,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 22,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
SETTINGS = [  # all but the first: `make test-equality`
    (Setting("odd", page_size=4, max_rows=6, num_steps=4), "bfloat16"),
    (Setting("odd", page_size=16, max_rows=20, num_steps=1), "float32"),
    (Setting("demo", page_size=4, max_rows=4, num_steps=4), "bfloat16"),
]
PARAMS = [
    pytest.param(
        each, id=f"{each[0]}-{each[1]}", marks=[pytest.mark.matrix] * (each != SETTINGS[0])
    )
    for each in SETTINGS
]
# The logprobs that training knows: of scores over temperature, nothing added to them.
TRAINED = ("greedy_told", "hot_told", "top_k", "top_p")
KINDS = (*TRAINED, "all", "hot_told", "penalties", "greedy_tops")
LENGTHS = (1, 2, 5, 16, 17, 31, 40, 63, 64, 65, 100, 129, 150, 200, 130, 9, 3, 50, 7, 90)


@dataclasses.dataclass
class Trainer:
    """Holds the parameters that the lab's engine serves."""

    graphdef: nnx.GraphDef
    params: nnx.State
    config: object

    def logprobs(self, answers: list[Answer], length: int, temperatures=None) -> list[np.ndarray]:
        """Of every token of each answer's text but the first; rows are padded to `length`."""
        tokens = np.zeros((len(answers), length), np.int32)
        for row, answer in zip(tokens, answers, strict=True):
            text = [*answer.request.prompt_ids, *answer.ids]
            row[: len(text)] = text
        if temperatures is None:
            temperatures = [answer.request.sampling.temperature for answer in answers]
        logprobs = np.asarray(self._run(self.params, tokens, np.float32(temperatures)))
        lengths = [len(answer.request.prompt_ids) + len(answer.ids) for answer in answers]
        return [row[: count - 1] for row, count in zip(logprobs, lengths, strict=True)]

    @functools.cached_property
    def _run(self):
        def run(params, tokens, temperatures):
            model = nnx.merge(self.graphdef, params)
            return served_logprobs(model, self.config, tokens, temperatures)

        return jax.jit(run, compiler_options=COMPILER_OPTIONS)


@pytest.fixture(scope="module", params=PARAMS)
def lab(request, tmp_path_factory, pytestconfig):
    setting, dtype = request.param
    folder = DEMO_MODEL
    if setting.model == "odd":
        folder = tmp_path_factory.mktemp("odd")
        write_checkpoint(ODD, folder, 3)
    options = {"dtype": dtype, "deterministic": True}
    lab = Lab(setting, Oracle(str(folder)), programs_folder(pytestconfig), **options)
    yield lab
    lab.release()
    jax.clear_caches()


@pytest.fixture(scope="module")
def trainer(lab) -> Trainer:
    dtype = lab._core.info.dtype
    config = dataclasses.replace(lab.oracle.config, dtype=dtype)
    graphdef, abstract = create_model(config)
    return Trainer(graphdef, load_params(Checkpoint(lab.oracle.folder), abstract), config)


@pytest.fixture(scope="module")
def requests(lab) -> list[Request]:
    vocab_size = lab.oracle.config.vocab_size
    return [
        make(
            KINDS[i % len(KINDS)],
            prompt_of(length, vocab_size, f"deterministic/{i}"),
            rid=f"{KINDS[i % len(KINDS)]}-{i}",
            seed=i,
            most=9,
        )
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def alone(lab, requests) -> dict[str, Answer]:
    answers = {}
    for request in requests:
        scheduler = lab.limit(has_cache=False)
        (answers[request.rid],) = lab.ask([request])
        assert scheduler.most_rows == scheduler.num_chunks(request.rid) == 1
    return answers


def bits(values) -> np.ndarray:
    return np.array(values, np.float32).view(np.int32)


def floats(answer: Answer) -> list[float]:
    """All that it was told: of the output, the prompt, the best tokens and those asked for."""
    told = [*answer.told, *answer.prompt_told]
    best = [value for part in told for top in part.tops or [] for value, _ in top]
    asked = [value for part in told for probe in part.probes or [] for value in probe]
    return [value for part in told for value in part.chosen] + best + asked


def check_same(answers: list[Answer], alone: dict[str, Answer]) -> None:
    count = 0
    for answer in answers:
        other = alone[answer.request.rid]
        assert answer.ids == other.ids, answer.request.rid
        got, wanted = bits(floats(answer)), bits(floats(other))
        assert np.array_equal(got, wanted), f"{answer.request.rid}: {(got != wanted).sum()} differ"
        count += len(wanted)
    print(f"{len(answers)} answers, {count} logprobs: no bit differs")
    assert count > 9 * len(answers) // 2


def test_in_a_batch(lab, requests, alone):
    """With every option of the sampler, whoever asks for it."""
    scheduler = lab.limit(has_cache=False)
    check_same(lab.ask(requests), alone)
    print(f"{scheduler.most_rows} rows, {scheduler.most_steps} steps in a dispatch")
    assert (
        scheduler.most_rows == lab.setting.max_rows
        and scheduler.most_steps == lab.setting.num_steps
    )


@pytest.mark.parametrize("sampler,kinds", [("plain", ("hot_told",)), ("full", ("all",))])
def test_drawn_by_another_sampler(lab, requests, alone, sampler, kinds):
    """A step draws for all of its rows as the most demanding of them asks."""
    chosen = [r for r in requests if r.rid.startswith(("greedy_told", *kinds))]
    lab.limit(has_cache=False)
    build, plans = lab._core._plan_builder.build, []
    lab._core._plan_builder.build = lambda schedule, **options: (
        plans.append(build(schedule, **options)) or plans[-1]
    )
    check_same(lab.ask(chosen), alone)
    samplers = collections.Counter(plan.sampler for plan in plans)
    print(f"{[request.rid for request in chosen]}: steps by sampler {dict(samplers)}")
    assert samplers[sampler] > 2


def test_beside_prompts_of_others(lab, requests, alone):
    scheduler = lab.limit(has_cache=False)
    check_same(lab.ask(requests, arrivals=[2 * i for i in range(len(requests))]), alone)
    print(f"{scheduler.num_mixed} mixed steps")
    assert scheduler.num_mixed > 5


@pytest.mark.parametrize("chunk", [7, 33, 128])
def test_in_chunks(lab, requests, alone, chunk):
    scheduler = lab.limit(has_cache=False, chunk=chunk)
    check_same(lab.ask(requests), alone)
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    print(f"200 tokens in {scheduler.num_chunks(longest.rid)} chunks")
    assert scheduler.num_chunks(longest.rid) >= 200 // chunk


def test_cached(lab, requests, alone):
    told_of_output = [r for r in requests if r.logprobs.start == len(r.prompt_ids)]
    scheduler = lab.limit()
    lab.ask(told_of_output)
    answers = lab.ask(told_of_output)
    print(f"cached: {[answer.cached_tokens for answer in answers]}, {scheduler.num_copies} copies")
    assert max(answer.cached_tokens for answer in answers) > 100
    check_same(answers, alone)


def test_retracted(lab, requests, alone):
    chosen = requests[5:9]  # of 31, 40, 63 and 64 tokens: each needs another page soon
    pages = sum(-(-len(r.prompt_ids) // lab.setting.page_size) for r in chosen)
    lab.limit(num_pages=1 + pages, has_cache=False, conservativeness=0.0)
    answers = lab.ask(chosen)
    print(f"retractions: {[answer.num_retractions for answer in answers]}")
    assert max(answer.num_retractions for answer in answers) > 0
    check_same(answers, alone)


def test_as_the_training_forward(lab, trainer, alone):
    """Of sampled tokens, whatever the batch, its order and padding."""
    answers = [a for rid, a in alone.items() if rid.startswith(TRAINED)]
    for chosen, length in ((answers, 211), (answers[3::-1], MOST_TOKENS)):
        trained = trainer.logprobs(chosen, length)
        differing = count = 0
        for answer, logprobs in zip(chosen, trained, strict=True):
            told = [value for part in answer.told for value in part.chosen]
            differing += (bits(told) != bits(logprobs[-len(answer.ids) :])).sum()
            count += len(told)
        print(f"{len(chosen)} x {length} tokens: {differing} of {count} logprobs differ")
        assert not differing and count == 9 * len(chosen)


def test_of_the_prompt_as_the_training_forward(trainer, alone):
    answers = [a for a in alone.values() if a.prompt_told][:4]
    trained = trainer.logprobs(answers, MOST_TOKENS, temperatures=[1.0] * 4)
    for answer, logprobs in zip(answers, trained, strict=True):
        told = [value for part in answer.prompt_told for value in part.chosen]
        first, last = answer.request.logprobs.start, len(answer.request.prompt_ids) - 1
        print(f"{len(told)} logprobs of a prompt of {last + 1} tokens")
        assert np.array_equal(bits(told), bits(logprobs[first:last])) and len(told) == last - first
    assert len(answers) == 4


def test_gradient_is_that_of_the_ordinary_forward(trainer):
    """The same operations, but compiled beside others. A row at temperature 0 has one too."""
    tokens = jax.random.randint(jax.random.key(0), (3, 21), 1, 300, jnp.int32)

    def loss(function, params, temperature):
        model = nnx.merge(trainer.graphdef, params)
        logprobs = function(model, tokens, temperature)
        return (logprobs * jnp.arange(20)).sum()

    def served(model, tokens, temperature):
        return served_logprobs(model, trainer.config, tokens, temperature)

    def gradients(function):
        run = jax.grad(lambda *arguments: loss(function, *arguments), argnums=(0, 1))
        temperature = jnp.array([0.8, 0.0, 1.3])
        found = jax.jit(run, compiler_options=COMPILER_OPTIONS)(trainer.params, temperature)
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(found)]

    pairs = list(zip(gradients(served), gradients(token_logprobs), strict=True))
    worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)
    print(f"{len(pairs)} gradients, of their largest part they differ by {worst:.1e} at most")
    assert all(np.isfinite(a).all() and np.abs(b).max() > 0 for a, b in pairs)
    assert worst < 1e-5


@pytest.mark.parametrize("deterministic", [True, False])
def test_step_in_a_loop_of_ones_own(deterministic):
    """Five rows one after the other, and at once. Without the mode bits do differ, or what is
    asserted of it here would say nothing."""
    config = dataclasses.replace(ModelConfig.from_dict(ODD), dtype="float32")
    prompts = [prompt_of(n, config.vocab_size, f"step/{n}") for n in (3, 17, 31, 40, 70)]
    options = {"max_len": 96, "max_tokens": 176, "page_size": 8, "deterministic": deterministic}

    def make_run(max_rows: int):
        step = make_step(config, max_rows=max_rows, **options)

        @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
        def run(params, tokens, lengths, seeds):
            state = step.init_state(SamplingBatch.of(max_rows, temperature=0.7, seeds=seeds))
            state, first = step(params, state, tokens, lengths)
            _, rest = step.decode(params, state, 8)
            return jnp.concatenate([first.logprobs[None], rest.logprobs]).T

        return run

    params = create_model(config, key=jax.random.key(0))[1]
    seeds = np.arange(10, dtype=np.int32).reshape(5, 2)
    runs = {count: make_run(count) for count in (1, 5)}

    def draw(chosen: list[int]) -> np.ndarray:
        tokens = np.zeros(176, np.int32)
        text = [token for i in chosen for token in prompts[i]]
        tokens[: len(text)] = text
        lengths = np.array([len(prompts[i]) for i in chosen], np.int32)
        run = runs[len(chosen)]
        return bits(run(params, tokens, lengths, jnp.array(seeds[chosen])))

    one = np.concatenate([draw([i]) for i in range(5)])
    differing = (one != draw([0, 1, 2, 3, 4])).sum()
    print(f"deterministic={deterministic}: {differing} of {one.size} logprobs differ")
    assert one.size == 45 and len(np.unique(one)) > 20
    assert (differing == 0) == deterministic


def test_the_ordinary_training_forward_differs(lab, trainer, alone):
    """Or what is asserted of the other would say nothing."""
    answer = alone["hot_told-13"]
    text = jnp.array([[*answer.request.prompt_ids, *answer.ids]], jnp.int32)
    temperature = float(answer.request.sampling.temperature)

    @jax.jit
    def ordinary(params):
        return token_logprobs(nnx.merge(trainer.graphdef, params), text, temperature)

    told = np.float32([value for part in answer.told for value in part.chosen])
    trained = np.asarray(ordinary(trainer.params))[0, -len(told) :]
    differing = (bits(told) != bits(trained)).sum()
    print(f"{differing} of {len(told)} logprobs differ, by {np.abs(trained - told).max():.1e}")
    assert differing > 0


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"--deterministic: the device is a gpu"):
        batch_invariant.check("gpu", "--deterministic")


@pytest.mark.parametrize("flag", ["--deterministic", "--enable-deterministic-inference"])
def test_flag(flag):
    parser = argparse.ArgumentParser()
    flags.add_flags(parser, EngineConfig)
    options = vars(parser.parse_args(["--model-path", "x", flag]))
    assert flags.take(EngineConfig, options).deterministic
    assert not EngineConfig(model_path="x").deterministic

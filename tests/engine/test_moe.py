"""A mixture of experts through the whole engine: chunks, batches, reloads, and which experts the
tokens take."""

import base64
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxserve import Engine, answer_queue
from jaxserve.errors import RequestError
from tests.golden.cases import MOE_CASES
from tests.golden.golden import read_golden
from tests.golden.random_checkpoint import write_checkpoint
from tests.server.serving import programs_folder

CASE = next(case for case in MOE_CASES if case.name == "qwen2_moe")
GREEDY = {"temperature": 0.0, "max_new_tokens": CASE.num_greedy_tokens, "ignore_eos": True}
CHUNK = 12  # with four decoding rows it fills the smallest bucket
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "model"
    write_checkpoint(CASE.config, folder, CASE.seed, **(CASE.checkpoint_options() | {"shards": 1}))
    return folder


@pytest.fixture(scope="module")
def engine(folder, pytestconfig):
    with Engine(
        model_path=str(folder),
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        page_size=4,
        chunked_prefill_size=CHUNK,
        max_running_requests=4,
        max_total_tokens=320,
        num_continuous_decode_steps=2,
        schedule_conservativeness=0.01,
        expert_distribution_recorder_mode="per_token",
        expert_distribution_recorder_buffer_size=-1,
        expert_distribution_recorder_dir=str(folder.parent / "records"),
        weights_root=str(folder.parent),
        compilation_cache_dir=programs_folder(pytestconfig),
    ) as engine:
        yield engine


def texts(engine, prompts) -> list[list[int]]:
    engine.flush_cache()
    answers = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    return [answer["output_ids"] for answer in answers]


def test_greedy_tokens_are_those_of_transformers(engine):
    """No golden token is close to the second best, so all must be equal."""
    prompts = read_golden(CASE.name).prompts
    assert min(prompt.gaps.min() for prompt in prompts) > 1e-3
    found = texts(engine, [prompt.tokens.tolist() for prompt in prompts])
    assert found == [prompt.greedy_tokens.tolist() for prompt in prompts]
    print(f"{sum(map(len, found))} tokens equal")


def test_batched_requests_answer_as_they_do_alone(engine):
    rng = np.random.default_rng(0)
    lengths = (1, 3, 12, 13, 30, 41)
    prompts = [rng.integers(3, CASE.config["vocab_size"], n).tolist() for n in lengths]
    together = texts(engine, prompts)
    assert together == [texts(engine, [prompt])[0] for prompt in prompts]
    assert len({tuple(text) for text in together}) == len(prompts)


def test_reloads_reach_every_expert(engine, folder):
    """Through a tree and from a folder: experts in another order, and a router that knows it."""
    prompts = [prompt.tokens.tolist() for prompt in read_golden(CASE.name).prompts]
    before, tensors = texts(engine, prompts), engine.weights()
    original = safetensors.numpy.load_file(folder / FILE)
    assert tensors.keys() == original.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, original[name].astype(np.float32), err_msg=name)

    permuted = permute_experts(tensors)
    changed = permuted | {
        name: -tensor for name, tensor in permuted.items() if ".experts.7.down_proj" in name
    }
    engine.update_weights(changed)
    assert texts(engine, prompts) != before, "the last expert counts"
    engine.update_weights(permuted)
    assert texts(engine, prompts) == before, "its order does not"

    other = folder.parent / "other"
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    safetensors.numpy.save_file({n: np.asarray(t) for n, t in changed.items()}, other / FILE)
    assert engine.update_weights_from_disk(str(other))["success"]
    np.testing.assert_array_equal(
        engine.weights()["model.layers.1.mlp.experts.7.down_proj.weight"],
        changed["model.layers.1.mlp.experts.7.down_proj.weight"],
    )
    assert texts(engine, prompts) != before
    assert engine.update_weights_from_disk(str(folder))["success"]
    assert texts(engine, prompts) == before


def routed(answer: dict) -> np.ndarray:
    """i32[tokens, layers, top_k]"""
    packed = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
    return packed.reshape(-1, CASE.config["num_hidden_layers"], CASE.config["num_experts_per_tok"])


def of_prompt(prompt) -> np.ndarray:
    """What transformers chooses, i32[tokens, layers, top_k], in ascending order."""
    return prompt.expert_ids.swapaxes(0, 1).astype(np.int32)


@pytest.fixture
def record(engine, folder):
    """Records what a function does; returns its result and the tensors of the file."""

    def run(function, *arguments):
        engine.flush_cache()
        engine.start_expert_distribution_record()
        result = function(*arguments)
        engine.stop_expert_distribution_record()
        path = pathlib.Path(engine.dump_expert_distribution_record())
        assert path.parent == folder.parent / "records"
        return result, safetensors.numpy.load_file(path)

    return run


def test_experts_of_prompts_are_those_that_transformers_chooses(engine, record):
    """Each token of each prompt once, in chunks, both prompts at once; nothing of padding."""
    prompts = read_golden(CASE.name).prompts
    ids = [prompt.tokens.tolist() for prompt in prompts]
    _, found = record(lambda: engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1}))
    wanted = {
        (token, position): choice.tolist()
        for prompt in prompts
        for position, (token, choice) in enumerate(
            zip(prompt.tokens.tolist(), of_prompt(prompt), strict=True)
        )
    }
    chosen = np.sort(found["topk_ids_of_layer"].swapaxes(0, 1), axis=-1)
    inputs = zip(found["input_ids"].tolist(), found["positions"].tolist(), strict=True)
    computed = list(zip(inputs, chosen.tolist(), strict=True))
    print(f"{len(computed)} tokens in passes of {found['num_tokens'].tolist()}")
    assert dict(computed) == wanted and len(computed) == sum(map(len, ids))
    assert max(found["num_tokens"]) <= CHUNK < max(map(len, ids))


def test_cached_tokens_are_not_counted_and_every_other_is(engine, record):
    prompt = read_golden(CASE.name).prompts[-1].tokens.tolist()

    def generate() -> list[dict]:
        return [engine.generate(input_ids=prompt, sampling_params=GREEDY) for _ in range(2)]

    answers, found = record(generate)
    cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
    output = CASE.num_greedy_tokens - 1  # the last one is nobody's input
    assert cached[0] == 0 < cached[1]
    assert found["num_tokens"].sum() == 2 * (len(prompt) + output) - cached[1]
    assert found["is_decode"].sum() == 2 * output
    print(f"{cached} cached, {found['num_tokens'].sum()} counted")
    assert (found["topk_ids_of_layer"] >= 0).all(), "every layer of this model has experts"


def test_an_answer_tells_which_experts_its_tokens_took(engine, record):
    """The same as a recording has, and as transformers chooses."""
    prompts = read_golden(CASE.name).prompts
    ids = [prompt.tokens.tolist() for prompt in prompts]
    answers, found = record(
        lambda: engine.generate(input_ids=ids, sampling_params=GREEDY, return_routed_experts=True)
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        told = routed(answer)
        assert len(told) == len(prompt.tokens) + CASE.num_greedy_tokens - 1
        np.testing.assert_array_equal(
            np.sort(told[: len(prompt.tokens)], axis=-1), of_prompt(prompt)
        )
    everything = np.concatenate([routed(answer) for answer in answers])
    recorded = found["topk_ids_of_layer"].swapaxes(0, 1)
    assert sorted(recorded.tolist()) == sorted(everything.tolist())
    print(f"{len(everything)} tokens")


def test_experts_are_told_from_a_position_on_and_before_it_the_cache_is_used(engine):
    prompt = read_golden(CASE.name).prompts[-1].tokens.tolist()
    options = {"input_ids": prompt, "sampling_params": GREEDY, "return_routed_experts": True}
    whole = engine.generate(**options)
    assert whole["meta_info"]["cached_tokens"] == 0, "all of it is computed, and so known"
    start = len(prompt) - 10
    rest = engine.generate(**options, routed_experts_start_len=start)
    np.testing.assert_array_equal(routed(rest), routed(whole)[start:])
    assert start - 4 <= rest["meta_info"]["cached_tokens"] <= start
    assert "routed_experts" not in engine.generate(input_ids=prompt)["meta_info"]


def test_experts_are_told_in_full_after_a_retraction(engine):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, CASE.config["vocab_size"], 20).tolist() for _ in range(4)]
    options = {
        "sampling_params": GREEDY | {"max_new_tokens": 90},
        "return_routed_experts": True,
    }
    alone = [engine.generate(input_ids=prompt, **options) for prompt in prompts]
    together = engine.generate(input_ids=prompts, **options)
    retractions = [answer["meta_info"]["num_retractions"] for answer in together]
    print(f"retractions {retractions}")
    assert sum(retractions) > 0
    for one, other in zip(alone, together, strict=True):
        assert one["output_ids"] == other["output_ids"]
        np.testing.assert_array_equal(routed(one), routed(other))
        assert len(routed(one)) == 20 + 90 - 1


def test_a_dump_that_is_refused_loses_nothing(engine, monkeypatch):
    """Neither what was recorded, nor the news of a step in flight."""
    monkeypatch.setattr(answer_queue, "MOST_WAITING", 0)
    options = {"input_ids": [5, 6, 7], "sampling_params": GREEDY | {"max_new_tokens": 250}}
    alone, refused = engine.generate(**options), 0
    engine.start_expert_distribution_record()
    output: list[int] = []
    for answer in engine.generate(**options, stream=True):
        output = answer["output_ids"]
        with pytest.raises(RequestError, match="calls wait for writing a record"):
            engine.dump_expert_distribution_record()
        refused += 1
    assert output == alone["output_ids"]
    engine.stop_expert_distribution_record()
    monkeypatch.undo()
    found = safetensors.numpy.load_file(engine.dump_expert_distribution_record())
    print(f"{refused} dumps refused, {found['num_tokens'].sum()} tokens recorded")
    assert refused > 3 and found["num_tokens"].sum() >= 249


def test_a_position_beyond_the_prompt_is_refused(engine):
    with pytest.raises(RequestError, match="routed_experts_start_len=3 is higher") as error:
        engine.generate(input_ids=[5, 6], return_routed_experts=True, routed_experts_start_len=3)
    assert error.value.param == "routed_experts_start_len"


def permute_experts(tensors: dict) -> dict:
    """Every layer's experts in reverse."""
    found = {}
    for name, tensor in tensors.items():
        prefix, is_expert, rest = name.partition(".experts.")
        if is_expert:
            number, _, projection = rest.partition(".")
            name = f"{prefix}.experts.{7 - int(number)}.{projection}"
        elif name.endswith("mlp.gate.weight"):
            tensor = jnp.flip(tensor, axis=0)
        found[name] = tensor
    return found

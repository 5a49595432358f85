"""A mixture of experts through the whole engine: chunks, batches, reloads."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxserve import Engine
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
        max_total_tokens=1024,
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

"""Checkpoints like the demo model's with other weights, and what an engine answers with each."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxserve import Engine
from jaxserve.errors import RequestError
from tests.server.serving import DEMO_MODEL, GREEDY, wait_for

QUESTION = "What is the capital of France?"
TEXTS = [QUESTION, "Once upon a time", "The capital of Kenya is", "5 + 7 =", "Monday, Tuesday,"]
TOKENS = GREEDY | {"ignore_eos": True, "max_new_tokens": 12}
ENDLESS = GREEDY | {"ignore_eos": True, "max_new_tokens": 3000}
SIXTY = TOKENS | {"max_new_tokens": 60}
FILE = "model.safetensors"


def write_variant(
    folder: pathlib.Path,
    edit: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    seed: int | None = 1,
) -> pathlib.Path:
    """A folder with the demo model's files, and its weights disturbed; `edit` may go on."""
    shutil.copytree(DEMO_MODEL, folder)
    tensors = dict(safetensors.numpy.load_file(folder / FILE))
    if seed is not None:
        rng = np.random.default_rng(seed)
        for name, tensor in tensors.items():
            noise = 1 + 0.3 * rng.standard_normal(tensor.shape, np.float32)
            tensors[name] = (tensor.astype(np.float32) * noise).astype(ml_dtypes.bfloat16)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / FILE)
    return folder


def shard(folder: pathlib.Path, count: int = 2) -> list[pathlib.Path]:
    """Deals the only file of a folder out to several, with an index."""
    tensors = safetensors.numpy.load_file(folder / FILE)
    (folder / FILE).unlink()
    paths, weight_map = [], {}
    for i in range(count):
        names = sorted(tensors)[i::count]
        path = folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names}, path)
        weight_map |= dict.fromkeys(names, path.name)
        paths.append(path)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def output(engine: Engine, text: str = QUESTION, **fields) -> list[int]:
    return engine.generate(text, TOKENS, **fields)["output_ids"]


def outputs(engine: Engine) -> list[list[int]]:
    """Of every text alone: what tells one version of the weights from another."""
    return [output(engine, text) for text in TEXTS]


def spans(answer: dict) -> list[tuple[str, int, int]]:
    return [(s["version"], s["start"], s["end"]) for s in answer["meta_info"]["weight_versions"]]


def live_bytes() -> int:
    """Of all arrays in this process."""
    return sum(array.nbytes for array in jax.live_arrays())


@contextlib.contextmanager
def nothing_changes(engine, expected):
    """Weights, label, what is cached, who is in flight, memory and descriptors."""
    engine.generate(QUESTION, TOKENS)
    state, fds, size = engine.state, len(os.listdir("/proc/self/fd")), at_rest(live_bytes)
    running = engine.generate(QUESTION, SIXTY, stream=True)
    next(running)
    yield
    answer = list(running)[-1]
    assert engine.state == state
    assert len(os.listdir("/proc/self/fd")) == fds
    assert at_rest(live_bytes) == size
    assert answer["output_ids"][:12] == expected[0]
    assert spans(answer) == [("default", 0, 60)]
    assert answer["meta_info"]["num_retractions"] == 0
    assert engine.generate(QUESTION, TOKENS)["meta_info"]["cached_tokens"] > 0
    assert output(engine) == expected[0]


def at_rest(number) -> int:
    """Once it does not change any more: a last step may still be read."""
    seen = [number()]
    wait_for(lambda: seen.append(number()) or seen[-1] == seen[-2], 5)
    return seen[-1]


def refused(engine, folder, **fields) -> str:
    with pytest.raises(RequestError) as error:
        engine.update_weights_from_disk(str(folder), weight_version="wrong", **fields)
    print(error.value)
    assert error.value.status == 400
    return str(error.value)

"""Weights from the program around the engine: any tree of them, at the start and later on."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxserve import Engine
from jaxserve.compile_counter import CompileCounter
from tests.engine.reloading import FILE, outputs, spans, write_variant
from tests.server.serving import DEMO_MODEL, programs_folder

OPTIONS = {"max_running_requests": 2, "chunked_prefill_size": 16, "max_total_tokens": 512}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> dict[str, jax.Array]:
    """Other weights than the demo model's, as a trainer might hold them."""
    folder = write_variant(tmp_path_factory.mktemp("update") / "other")
    return jax.tree.map(jnp.asarray, safetensors.numpy.load_file(folder / FILE))


@pytest.fixture(scope="module")
def engine(pytestconfig):
    folder = programs_folder(pytestconfig)
    with Engine(model_path=str(DEMO_MODEL), compilation_cache_dir=folder, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine, other, pytestconfig):
    """What an engine answers that has started with the weights."""
    folder = programs_folder(pytestconfig)
    options = OPTIONS | {"compilation_cache_dir": folder}
    with Engine(model_path=str(DEMO_MODEL), params=other, **options) as started:
        return {"demo": outputs(engine), "other": outputs(started)}


def nested(tensors: dict[str, jax.Array]) -> dict:
    tree: dict = {}
    for name, tensor in tensors.items():
        node = tree
        *path, last = name.split(".")
        for key in path:
            node = node.setdefault(key, {})
        node[last] = tensor
    return tree


def test_weights_of_a_tree_serve_from_the_next_step_on(engine, expected, other):
    assert expected["demo"] != expected["other"]
    demo = engine.weights()
    for tree, name in ((other, "other"), (nested(demo), "demo"), (nested(other), "other")):
        engine.update_weights(tree, weight_version=name)
        assert outputs(engine) == expected[name]
        answer = engine.generate("Hello", {"max_new_tokens": 3, "ignore_eos": True})
        assert spans(answer) == [(name, 0, 3)]
        assert answer["meta_info"]["cached_tokens"] == 0, "what others computed is not matched"
    engine.update_weights(demo)
    assert outputs(engine) == expected["demo"]


def test_weights_are_given_back_by_their_names(engine, other):
    demo = engine.weights()
    checkpoint = safetensors.numpy.load_file(f"{DEMO_MODEL}/{FILE}")
    assert demo.keys() == checkpoint.keys() == other.keys()
    for name, tensor in demo.items():
        np.testing.assert_array_equal(tensor, checkpoint[name])
    engine.update_weights(other)
    for name, tensor in engine.weights().items():
        np.testing.assert_array_equal(tensor, other[name])
    engine.update_weights(demo)


def test_what_is_not_fused_is_neither_copied_nor_compiled_for(engine, other):
    demo = engine.weights()
    engine.update_weights(other)  # the function that fuses is compiled here, if nowhere before
    counter = CompileCounter()
    times = []
    for tree in (demo, other) * 5:
        began = time.perf_counter()
        engine.update_weights(tree)
        times.append(1e3 * (time.perf_counter() - began))
    counter.close()
    print(f"update_weights took {min(times):.2f} to {max(times):.2f} ms")
    assert not any(counter.report().values()), counter.report()
    serving = engine._core.weights
    shared = [leaf for leaf in serving if any(leaf is tensor for tensor in other.values())]
    assert len(shared) == 2 + 4 * 6, "embedding, last norm; per layer two norms, o_proj, down_proj"
    engine.update_weights(demo)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tensors_of_another_dtype_are_cast(engine, expected, other, dtype):
    demo = engine.weights()
    engine.update_weights({name: tensor.astype(dtype) for name, tensor in other.items()})
    assert outputs(engine) == expected["other"]
    engine.update_weights(demo)


def test_tree_that_does_not_fit_changes_nothing(engine, expected, other):
    wrong = dict(other)
    name = next(iter(wrong))
    wrong[name] = wrong[name][:1]
    with pytest.raises(ValueError, match="wrong shape: "):
        engine.update_weights(wrong)
    del wrong[name]
    with pytest.raises(ValueError, match=f"missing: {name}"):
        engine.update_weights(wrong)
    assert outputs(engine) == expected["demo"]


def test_request_in_flight_may_see_two_versions(engine, other):
    demo = engine.weights()
    sampling = {"temperature": 0.0, "max_new_tokens": 200, "ignore_eos": True}
    stream = engine.generate("Once upon a time", sampling, stream=True)
    next(stream)
    engine.update_weights(other, weight_version="new", in_flight="in_place")
    *_, last = stream
    versions = spans(last)
    print(f"versions of the output: {versions}")
    assert [version for version, *_ in versions][-1] == "new" and len(versions) == 2
    engine.update_weights(demo, weight_version="default")

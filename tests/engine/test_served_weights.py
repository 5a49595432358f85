"""The weights that serve, read on the host: all of them, and nothing of them stays there.

On a CPU the host's memory is the device's, and nothing is copied; but of an array on two devices
something is, as it is of one on a GPU.
"""

import hashlib
import json
import types
import weakref

import jax
import numpy as np
import pytest

from jaxserve import served_weights
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.models.weights import views
from jaxserve.served_weights import ServedWeights, copy_to_host
from tests.golden.cases import CASES

CASE_NAMES = ("qwen2", "qwen3_moe")  # parameters that hold several tensors, and many


def on_two_devices(array: np.ndarray) -> jax.Array:
    mesh = jax.make_mesh((2,), ("x",))
    spec = jax.sharding.PartitionSpec(*[None] * (array.ndim - 1), "x")
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))


@pytest.fixture(scope="module", params=CASE_NAMES)
def model(request) -> tuple[ServedWeights, list[np.ndarray]]:
    """And the parameters that it serves."""
    (case,) = (case for case in CASES if case.name == request.param)
    abstract = create_model(ModelConfig.from_dict(case.config))[1]
    rng = np.random.default_rng(0)
    host = [rng.normal(size=a.shape).astype(a.dtype) for a in jax.tree.leaves(abstract)]
    runner = types.SimpleNamespace(weights=[on_two_devices(array) for array in host])
    return ServedWeights(abstract, runner), host


@pytest.fixture
def copies(monkeypatch) -> list[tuple[weakref.ref, int]]:
    """Each that is made of a parameter, and how many there are then."""
    made = []

    def copy(leaf: jax.Array) -> np.ndarray:
        array = copy_to_host(leaf)
        made.append((weakref.ref(array), 1 + sum(one() is not None for one, _ in made)))
        return array

    monkeypatch.setattr(served_weights, "copy_to_host", copy)
    return made


def test_an_array_keeps_what_numpy_has_read_of_it():
    """Or what is asserted here of others would say nothing."""
    leaf = on_two_devices(np.ones((4, 4), np.float32))
    copy = weakref.ref(np.asarray(leaf))
    assert copy() is not None
    del leaf


def test_copy_is_free_as_soon_as_it_is_dropped():
    expected = np.arange(32, dtype=np.float32).reshape(4, 8)
    leaf = on_two_devices(expected)
    copy = copy_to_host(leaf)
    np.testing.assert_array_equal(copy, expected)
    dropped = weakref.ref(copy)
    del copy
    assert dropped() is None


def test_checksum_copies_each_parameter_once_and_leaves_nothing(model, copies):
    served, host = model
    by_path = dict(zip((view.path for view in unique(served)), host, strict=True))
    sha256 = hashlib.sha256()
    for view in sorted(views(served.abstract), key=lambda view: view.name):
        tensor = np.ascontiguousarray(by_path[view.path][view.index]).reshape(view.shape)
        sha256.update(f"{view.name} {tensor.dtype} {tensor.shape}\n".encode() + tensor.tobytes())
    assert served.checksum() == sha256.hexdigest()
    most = max(count for _, count in copies)
    print(f"{len(views(served.abstract))} tensors, {len(copies)} copies, {most} at a time")
    assert len(copies) == len(host) < len(views(served.abstract)) and 1 < most <= len(host) // 2
    assert not any(copy() is not None for copy, _ in copies)


def test_rows_of_a_tensor_leave_nothing(model, copies):
    served, _ = model
    name = "model.layers.0.self_attn.k_proj.weight"
    rows = json.loads(served.read_tensor(name, most_rows=3))
    (view,) = (view for view in views(served.abstract) if view.name == name)
    assert np.shape(rows) == (3, view.shape[1]) and len(copies) == 1
    assert copies[0][0]() is None


def unique(served: ServedWeights) -> list:
    """A view of each parameter, in their order."""
    return list({view.path: view for view in views(served.abstract)}.values())

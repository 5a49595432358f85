"""Orbax checkpoints, whoever wrote them: what is read, onto which devices, and what is refused."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from orbax.checkpoint import v1

from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.load_format import format_of, open_checkpoint
from jaxserve.models.registry import create_model
from jaxserve.models.weights import load_params
from tests.golden.cases import CASES
from tests.golden.random_checkpoint import write_checkpoint
from tests.models.orbax_trees import SAVED, nested

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASE = next(case for case in CASES if case.name == "llama_biases")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """Safetensors of a Llama with biases everywhere, in bfloat16."""
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(CASE.config, folder, CASE.seed, shards=1, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def tensors(source) -> dict[str, np.ndarray]:
    return dict(safetensors.numpy.load_file(source / "model.safetensors"))


@pytest.fixture(scope="module")
def abstract(source) -> nnx.State:
    return create_model(ModelConfig.from_pretrained(source))[1]


@pytest.fixture(scope="module")
def expected(source, abstract) -> nnx.State:
    return load_params(Checkpoint(source), abstract)


def load(folder: pathlib.Path, abstract: nnx.State) -> tuple[nnx.State, dict[str, np.ndarray]]:
    """The parameters, and each tensor as a whole; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(folder, "auto", abstract)
    params = load_params(checkpoint, abstract)
    whole = {name: checkpoint.read(name) for name in checkpoint.names()}
    checkpoint.check_unchanged()
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before
    return params, whole


def assert_equal(found: tuple[nnx.State, dict], expected: nnx.State, tensors: dict) -> None:
    params, whole = found
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert whole.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert whole[name].dtype == tensor.dtype
        assert whole[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("how", SAVED)
def test_every_way_to_save_is_read(tmp_path, abstract, expected, tensors, how):
    save, tree, inner = SAVED[how]
    save(tmp_path / "saved", tree(tensors))
    assert format_of(tmp_path / "saved" / inner) == "orbax"
    assert_equal(load(tmp_path / "saved" / inner, abstract), expected, tensors)


def test_tree_of_an_older_orbax_does_not_tell_of_the_store(tmp_path, abstract, expected, tensors):
    save, tree, _ = SAVED["standard"]
    save(tmp_path / "saved", tree(tensors))

    def without_newer_keys(content):
        for key in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value"):
            del content[key]

    edit_json(tmp_path / "saved/_METADATA", without_newer_keys)
    (tmp_path / "saved/_CHECKPOINT_METADATA").unlink()
    (tmp_path / "saved/commit_success.txt").unlink()
    assert_equal(load(tmp_path / "saved", abstract), expected, tensors)


@pytest.mark.parametrize("tree", [lambda p: p, nnx.to_pure_dict], ids=["state", "dict"])
def test_tree_that_is_fused_is_read_and_gives_the_tensors(
    tmp_path, abstract, expected, tensors, tree
):
    v1.save(tmp_path / "fused", tree(expected))
    names = json.loads((tmp_path / "fused/state/_METADATA").read_text())["tree_metadata"]
    assert any("qkv_proj" in name for name in names) and not any("q_proj" in n for n in names)
    assert_equal(load(tmp_path / "fused", abstract), expected, tensors)


def test_fused_tree_of_another_shape_is_told_in_the_checkpoints_names(tmp_path, abstract, expected):
    tree = nnx.to_pure_dict(expected)
    mlp = tree["model"]["layers"][1]["mlp"]["gate_up_proj"]
    mlp["weight"] = mlp["weight"][:, 1:]
    v1.save(tmp_path / "fused", tree)
    checkpoint = open_checkpoint(tmp_path / "fused", "orbax", abstract)
    with pytest.raises(ValueError, match=rf"wrong shape: .*{UP} \(checkpoint \[2, 95, 64\], model"):
        load_params(checkpoint, abstract)
    checkpoint.close()


SAVE_SHARDED = """
import sys, jax, numpy as np, safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
tensors = safetensors.numpy.load_file(sys.argv[1])
specs = [P("a", "b"), P(None, ("a", "b")), P(("a", "b"), None), P("b")]
put = {
    name: jax.device_put(t, NamedSharding(mesh, specs[i % 3] if t.ndim == 2 else P(("a", "b"))))
    for i, (name, t) in enumerate(tensors.items())
}
assert len(next(iter(put.values())).sharding.device_set) == 4
v1.save(sys.argv[2], put)
"""

LOAD_SHARDED = """
import sys, threading, jax, numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxserve.models.config import ModelConfig
from jaxserve.models.load_format import open_checkpoint
from jaxserve.models.orbax_arrays import OrbaxArrays
from jaxserve.models.registry import create_model
from jaxserve.models.sharding import param_shardings
from jaxserve.models.weights import load_params

source, *folders = sys.argv[1:]
abstract = create_model(ModelConfig.from_pretrained(source))[1]
mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
shardings = param_shardings(abstract, mesh)
expected = load_params(open_checkpoint(source), abstract)
read = []

def read_box(self, name, shape, box, out, original=OrbaxArrays.read_box):
    read.append(out.size)
    original(self, name, shape, box, out)

OrbaxArrays.read_box = read_box
for folder in folders:
    read.clear()
    params = load_params(open_checkpoint(folder, "orbax", abstract), abstract, shardings)
    shards = [s for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    held = sum(s.data.size for s in shards if s.replica_id == 0)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(folder, "numbers read", sum(read), "held", held, "of the model", whole)
    sys.stdout.flush()
    assert sum(read) == held == whole
    cut = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params)]
    assert sum(cut) > len(cut) // 2
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
"""


def run_on_four_devices(script: str, *arguments: object) -> str:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_saved_from_four_devices_and_loaded_onto_one_or_two(
    tmp_path, source, abstract, expected, tensors
):
    """Each of the two reads what it holds, and nothing else."""
    sharded, fused = tmp_path / "sharded", tmp_path / "fused"
    run_on_four_devices(SAVE_SHARDED, source / "model.safetensors", sharded)
    checkpoint = open_checkpoint(sharded)
    chunks = checkpoint.file_of(UP)._arrays[UP].chunk_layout.read_chunk.shape
    assert np.prod(chunks) * 4 == tensors[UP].size, "it was not saved in four parts"
    checkpoint.close()
    assert_equal(load(sharded, abstract), expected, tensors)
    v1.save(fused, expected)
    out = run_on_four_devices(LOAD_SHARDED, source, sharded, fused)
    assert out.count("numbers read") == 2


def test_columns_are_read_only_as_far_as_they_are_asked_for(tmp_path, tensors):
    v1.save(tmp_path / "saved", tensors)
    checkpoint = open_checkpoint(tmp_path / "saved")
    tensor = tensors[UP]
    out = np.empty((2, 3, 5), np.float32)
    shape = (tensor.shape[0] // 4, 4, tensor.shape[1])
    checkpoint.file_of(UP).read_box(UP, shape, [(1, 3), (1, 4), (7, 12)], out)
    expected = tensor.reshape(shape)[1:3, 1:4, 7:12].astype(np.float32)
    np.testing.assert_array_equal(out, expected)
    checkpoint.close()


# What is not read.


@pytest.fixture
def saved(tmp_path, tensors) -> pathlib.Path:
    v1.save(tmp_path / "saved", nested(tensors))
    return tmp_path / "saved"


def edit_json(path: pathlib.Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max(folder.rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)


def rename(suffix: str):
    return lambda saved: saved.rename(saved.with_name(saved.name + suffix))


def not_committed(saved: pathlib.Path) -> None:
    edit_json(saved / "_CHECKPOINT_METADATA", lambda c: c.update(commit_timestamp_nsecs=None))


def tree(saved: pathlib.Path) -> pathlib.Path:
    return saved / "state/_METADATA"


def rename_a_tensor(key: str):
    def change(content):
        content["use_ocdbt"] = False
        entry = next(iter(content["tree_metadata"].values()))
        entry["key_metadata"] = [{"key": key}]

    return lambda saved: edit_json(tree(saved), change)


def link_a_folder(saved: pathlib.Path) -> None:
    (saved / "state/d").rename(saved.parent / "d")
    (saved / "state/d").symlink_to(saved.parent / "d")


def pipe(saved: pathlib.Path) -> None:
    os.mkfifo(saved / "state/d/pipe")


def without_entries(content) -> None:
    content["tree_metadata"] = {"a": 5}


FAULTS = {
    "temporary": (rename(".orbax-checkpoint-tmp-5"), "is not finished"),
    "partly saved": (rename(".partial_save"), "is not finished"),
    "not committed": (not_committed, "is not finished: _CHECKPOINT_METADATA has no commit"),
    "not merged": (lambda s: (s / "state/manifest.ocdbt").unlink(), "it lacks manifest.ocdbt"),
    "two of them": (
        lambda s: shutil.copytree(s / "state", s / "b"),
        "several orbax checkpoints: b,",
    ),
    "no tree": (lambda s: tree(s).unlink(), "Cannot find any model weights with"),
    "tree that is no JSON": (lambda s: tree(s).write_text("{"), "_METADATA is not JSON"),
    "tree that is a list": (lambda s: tree(s).write_text("[]"), "_METADATA is no JSON object"),
    "tree without entries": (lambda s: edit_json(tree(s), without_entries), "no usable tree_meta"),
    "tree without arrays": (
        lambda s: edit_json(tree(s), lambda c: c.update(tree_metadata={})),
        "there is no array in its tree",
    ),
    "name that leads outside": (rename_a_tensor("../../../x"), "Invalid file path"),
    "name that is a path": (rename_a_tensor("/etc/x"), "Invalid file path"),
    "name that is not there": (rename_a_tensor("nobody"), "nobody: NOT_FOUND"),
    "link to a folder": (link_a_folder, "is a link to a folder"),
    "pipe": (pipe, "is no regular file"),
    "truncated": (lambda s: os.truncate(largest(s), largest(s).stat().st_size // 2), "saved/state"),
    "emptied": (lambda s: os.truncate(largest(s), 0), "saved/state"),
    "lost": (lambda s: largest(s).unlink(), "saved/state"),
    "damaged manifest": (
        lambda s: (s / "state/manifest.ocdbt").write_bytes(b"x" * 100),
        "manifest.ocdbt",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_told_in_words(saved, abstract, name):
    break_it, words = FAULTS[name]
    before = len(os.listdir("/proc/self/fd"))
    break_it(saved)
    folder = next(path for path in saved.parent.iterdir() if path.name.startswith("saved"))
    with pytest.raises((ValueError, OSError)) as told:
        checkpoint = open_checkpoint(folder, "auto", abstract)
        try:
            load_params(checkpoint, abstract)
        finally:
            checkpoint.close()
    print(told.value)
    assert words in str(told.value) and "jaxserve-orbax-" not in str(told.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_lost_file_of_a_chunk_is_no_zeros(tmp_path, abstract, tensors):
    save, tree, _ = SAVED["a file for each chunk"]
    save(tmp_path / "saved", tree(tensors))
    (tmp_path / "saved" / UP / "0.0").unlink()
    checkpoint = open_checkpoint(tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"{UP}: NOT_FOUND: chunk .* is missing"):
        load_params(checkpoint, abstract)
    checkpoint.close()


def test_chunk_larger_than_its_tensor_is_refused(tmp_path, tensors):
    """Whoever reads any of it would make room for all of it."""
    save, tree, _ = SAVED["a file for each chunk"]
    save(tmp_path / "saved", tree(tensors))
    edit_json(tmp_path / "saved" / UP / ".zarray", lambda c: c.update(chunks=[1 << 20, 1 << 20]))
    with pytest.raises(ValueError, match=f"{UP}: its chunks are larger than itself"):
        open_checkpoint(tmp_path / "saved")


def test_more_files_than_may_be_open_is_told(saved):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, before[1]))
    try:
        with pytest.raises(ValueError, match="state has more files than `ulimit -n` allows"):
            open_checkpoint(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_was_opened_is_what_is_read(saved, abstract, expected, tensors):
    """Names that lead elsewhere meanwhile lead nobody there, and are noticed."""
    checkpoint = open_checkpoint(saved, "orbax", abstract)
    moved = saved.rename(saved.with_name("moved"))
    saved.mkdir()
    params = load_params(checkpoint, abstract)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    checkpoint.check_unchanged()
    (saved / "state").symlink_to(moved / "state")
    checkpoint.check_unchanged()
    (moved / "state/manifest.ocdbt").touch()
    with pytest.raises(ValueError, match=r"state/manifest.ocdbt was rewritten while it was read"):
        checkpoint.check_unchanged()
    checkpoint.close()


def test_reading_loads_no_orbax(saved):
    script = (
        "import sys; from jaxserve.models.load_format import open_checkpoint\n"
        f"checkpoint = open_checkpoint({str(saved)!r}); print(len(checkpoint.read({UP!r})))\n"
        "print('loaded:', [name for name in ('orbax', 'tensorstore') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded: ['tensorstore']", done.stdout + done.stderr

"""From a checkpoint to parameters and back: names, places, dtypes, shards, devices and refusals."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxserve.models.checkpoint import INDEX_FILE, Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import ARCHITECTURES, create_model
from jaxserve.models.weights import (
    ParamReader,
    ShardProgress,
    check,
    checkpoint_tensors,
    load_params,
)
from tests.golden.cases import CASES, Case
from tests.golden.random_checkpoint import write_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
# All architectures, all dtypes, biases, tied and not, one file and several.
NAMES = (
    "llama_mha",
    "llama3",
    "llama_biases",
    "llama_head_dim_80",
    "llama_tied",
    "mistral_window",
    "qwen2",
    "qwen3",
    "qwen3_bias",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral_window",
    "olmoe",
)
VARIANTS = {case.name: case for case in CASES if case.name in NAMES}


def write(case: Case, folder: pathlib.Path, **options) -> pathlib.Path:
    write_checkpoint(case.config, folder, case.seed, **(case.checkpoint_options() | options))
    return folder


def abstract_params(folder: pathlib.Path, dtype: str = "float32") -> nnx.State:
    return create_model(ModelConfig.from_pretrained(folder), dtype=jnp.dtype(dtype))[1]


def load(folder: pathlib.Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The parameters by their path, as `model.norm.weight`."""
    checkpoint = Checkpoint(folder)
    try:
        params = load_params(checkpoint, abstract_params(folder, dtype))
    finally:
        checkpoint.close()
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in by_path(params)}


def by_path(params: nnx.State) -> list:
    return list(nnx.to_flat_state(params))


def tensors_in(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = [safetensors.numpy.load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.fixture
def biased(tmp_path) -> pathlib.Path:
    """A Llama with biases everywhere, in two files."""
    return write(VARIANTS["llama_biases"], tmp_path)


@pytest.fixture
def single(tmp_path) -> pathlib.Path:
    """The same in one file."""
    return write(VARIANTS["llama_biases"], tmp_path, shards=1)


def change(folder: pathlib.Path, edit) -> None:
    """Rewrites the only file of a checkpoint; `edit` is given its tensors."""
    path = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_variants_cover_every_architecture():
    covered = {case.config["architectures"][0] for case in VARIANTS.values()}
    assert covered == set(ARCHITECTURES) and len(VARIANTS) == len(NAMES)


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_saving_is_the_inverse_of_loading(case, tmp_path):
    write(case, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    saved = checkpoint_tensors(load_params(checkpoint, abstract_params(tmp_path, case.dtype)))
    checkpoint.close()
    original = tensors_in(tmp_path)
    assert saved.keys() == original.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == original[name].dtype == jnp.dtype(case.dtype)
        np.testing.assert_array_equal(tensor, original[name], err_msg=name)


def random_params(abstract: nnx.State) -> nnx.State:
    rng = np.random.default_rng(0)
    return nnx.from_flat_state(
        {
            tuple(path): leaf.replace(rng.standard_normal(leaf.shape).astype(leaf.dtype))
            for path, leaf in by_path(abstract)
        }
    )


@pytest.mark.parametrize("name", ["llama_head_dim_80", "qwen2", "qwen3_bias", "mixtral_window"])
def test_loading_is_the_inverse_of_saving(name, tmp_path):
    config = ModelConfig.from_dict(VARIANTS[name].config)
    abstract = create_model(config, dtype=jnp.bfloat16)[1]
    params = random_params(abstract)
    safetensors.numpy.save_file(checkpoint_tensors(params), tmp_path / "model.safetensors")
    loaded = load_params(Checkpoint(tmp_path), abstract)
    for (path, leaf), (_, expected) in zip(by_path(loaded), by_path(params), strict=True):
        np.testing.assert_array_equal(leaf[...], expected[...], err_msg=str(path))


def test_fused_parts_land_where_they_belong(tmp_path):
    folder = write(VARIANTS["llama_head_dim_80"], tmp_path)
    params, tensors = load(folder), tensors_in(folder)
    num_kv_heads, group, head_dim = 2, 3, 80
    for layer in ("model.layers.0", "model.layers.2"):
        qkv = params[f"{layer}.self_attn.qkv_proj.weight"]
        q, k, v = (tensors[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
        for head in range(num_kv_heads * group):
            lines = q[head * head_dim : (head + 1) * head_dim]
            np.testing.assert_array_equal(qkv[head // group, head % group], lines)
        for head in range(num_kv_heads):
            lines = slice(head * head_dim, (head + 1) * head_dim)
            np.testing.assert_array_equal(qkv[head, group], k[lines])
            np.testing.assert_array_equal(qkv[head, group + 1], v[lines])
        gate, up = params[f"{layer}.mlp.gate_up_proj.weight"]
        np.testing.assert_array_equal(gate, tensors[f"{layer}.mlp.gate_proj.weight"])
        np.testing.assert_array_equal(up, tensors[f"{layer}.mlp.up_proj.weight"])


def test_fused_biases_land_where_they_belong(biased):
    params, tensors = load(biased), tensors_in(biased)
    layer = "model.layers.1"
    qkv = params[f"{layer}.self_attn.qkv_proj.bias"]
    q, k, v = (tensors[f"{layer}.self_attn.{name}_proj.bias"] for name in "qkv")
    np.testing.assert_array_equal(qkv[:, :2].reshape(-1), q)
    np.testing.assert_array_equal(qkv[:, 2].reshape(-1), k)
    np.testing.assert_array_equal(qkv[:, 3].reshape(-1), v)
    gate, up = params[f"{layer}.mlp.gate_up_proj.bias"]
    np.testing.assert_array_equal(gate, tensors[f"{layer}.mlp.gate_proj.bias"])
    np.testing.assert_array_equal(up, tensors[f"{layer}.mlp.up_proj.bias"])


@pytest.mark.parametrize(
    "name,block,names",
    [
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral_window", "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_experts_are_stacked(tmp_path, name, block, names):
    folder = write(VARIANTS[name], tmp_path)
    params, tensors = load(folder, VARIANTS[name].dtype), tensors_in(folder)
    block = f"model.layers.1.{block}"
    gate_up = params[f"{block}.experts.gate_up_proj.weight"]
    down = params[f"{block}.experts.down_proj.weight"]
    assert gate_up.shape[:2] == (8, 2) and len(down) == 8
    for expert in range(8):
        gate, up, expected = (tensors[f"{block}.experts.{expert}.{n}.weight"] for n in names)
        np.testing.assert_array_equal(gate_up[expert], np.stack([gate, up]))
        np.testing.assert_array_equal(down[expert], expected)
    np.testing.assert_array_equal(params[f"{block}.gate.weight"], tensors[f"{block}.gate.weight"])


def test_experts_are_read_straight_into_their_places(tmp_path):
    """What is allocated beside the stacked array stays far below one more of it."""
    config = VARIANTS["qwen3_moe"].config | {"hidden_size": 256, "moe_intermediate_size": 512}
    case = dataclasses.replace(VARIANTS["qwen3_moe"], config=config)
    write(case, tmp_path)
    abstract, checkpoint = abstract_params(tmp_path, case.dtype), Checkpoint(tmp_path)
    reader = ParamReader(checkpoint, abstract)
    sizes = {}
    for number, (path, leaf) in enumerate(by_path(abstract)):
        if "experts" in path:
            tracemalloc.start()
            stacked = reader.read(number, tuple(slice(size) for size in leaf.shape))
            sizes[path] = stacked.nbytes, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    checkpoint.close()
    assert len(sizes) == 2
    for nbytes, peak in sizes.values():
        print(f"{nbytes} bytes stacked, at most {peak} allocated")
        assert nbytes > 2e6 and nbytes <= peak < 1.05 * nbytes


def test_parameter_that_is_not_fused_keeps_its_name_and_shape(biased):
    params, tensors = load(biased), tensors_in(biased)
    shared = params.keys() & tensors.keys()
    assert {name for name in params if "qkv" not in name and "gate_up" not in name} == shared
    for name in shared:
        np.testing.assert_array_equal(params[name], tensors[name], err_msg=name)


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_number_of_files_makes_no_difference(tmp_path, shards):
    case = VARIANTS["llama3"]
    one = load(write(case, tmp_path / "one", shards=1), "bfloat16")
    several = load(write(case, tmp_path / "several", shards=shards), "bfloat16")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) == shards
    for name, array in one.items():
        np.testing.assert_array_equal(several[name], array, err_msg=name)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("served", ["float32", "float16", "bfloat16"])
def test_parameters_are_cast_to_the_models_dtype(tmp_path, stored, served):
    folder = write(VARIANTS["qwen2"], tmp_path, dtype=stored)
    params, tensors = load(folder, served), tensors_in(folder)
    expected = np.concatenate(
        [tensors[f"model.layers.0.self_attn.{name}_proj.bias"].reshape(2, -1) for name in "qkv"], 1
    )
    qkv = params["model.layers.0.self_attn.qkv_proj.bias"]
    assert {array.dtype for array in params.values()} == {jnp.dtype(served)}
    np.testing.assert_array_equal(qkv.reshape(2, -1), expected.astype(served))
    norm = tensors["model.norm.weight"]
    np.testing.assert_array_equal(params["model.norm.weight"], norm.astype(served))


def test_dtype_of_one_tensor_may_differ(single):
    change(single, lambda tensors: tensors.update({"model.norm.weight": np.arange(64.0)}))
    assert load(single)["model.norm.weight"].tolist() == list(range(64))


def test_every_difference_is_named_at_once(single):
    def edit(tensors):
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(65, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)

    change(single, edit)
    with pytest.raises(ValueError, match=f"{single} does not fit the model") as raised:
        load(single)
    message = str(raised.value)
    assert "missing: model.layers.0.self_attn.k_proj.weight;" in message
    assert "not in the model: model.layers.9.mlp.up_proj.weight;" in message
    assert "model.norm.weight (checkpoint [65], model [64])" in message
    assert "not floating point: lm_head.weight (int32)" in message


def test_differences_are_counted_where_there_are_many(single):
    change(single, lambda tensors: [tensors.pop(name) for name in list(tensors)[:10]])
    with pytest.raises(ValueError, match=r"missing: (\S+, ){7}\S+ and 2 more$"):
        load(single)


def test_transposed_matrix_is_refused(single):
    name = "model.layers.0.mlp.down_proj.weight"

    def edit(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    change(single, edit)
    with pytest.raises(ValueError, match=rf"{name} \(checkpoint \[96, 64\], model \[64, 96\]\)"):
        load(single)


def test_nothing_is_read_from_a_checkpoint_that_does_not_fit(single):
    change(single, lambda tensors: tensors.pop("model.norm.weight"))
    bytes_read = []
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        load_params(
            Checkpoint(single),
            abstract_params(single),
            on_bytes=lambda path, count: bytes_read.append(count),
        )
    assert not bytes_read


def test_buffers_of_old_checkpoints_are_ignored(single):
    change(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8)}))
    load(single)


def test_tied_head_may_be_stored_and_is_ignored(tmp_path):
    folder = write(VARIANTS["llama_tied"], tmp_path)
    before = load(folder)
    change(folder, lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}))
    after = load(folder)
    assert "lm_head.weight" not in after
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_untied_head_is_wanted(single):
    change(single, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load(single)


def test_check_reads_the_headers_alone(single):
    checkpoint = Checkpoint(single)
    os.truncate(single / "model.safetensors", 100_000)
    check(checkpoint, abstract_params(single))
    with pytest.raises(ValueError, match="was it rewritten"):
        load_params(checkpoint, abstract_params(single))


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"Cannot find any model weights with `{tmp_path}`"):
        Checkpoint(tmp_path)


def test_missing_files_are_named(biased):
    for path in biased.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00001-of-.*, model-00002-of-"):
        Checkpoint(biased)


def test_damaged_file_is_named_and_none_stays_open(biased):
    path = biased / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    before = os.dup(0)
    os.close(before)
    with pytest.raises(ValueError, match=str(path)):
        Checkpoint(biased)
    after = os.dup(0)
    os.close(after)
    assert after == before


def test_file_that_the_index_does_not_name_is_not_read(biased):
    (biased / "consolidated.safetensors").write_bytes(b"no safetensors")
    load(biased)


@pytest.mark.parametrize("name", ["../x.safetensors", "/dev/zero", "a/b.safetensors", ".."])
def test_index_that_names_a_file_outside_its_folder_is_refused(biased, name):
    (biased.parent / "x.safetensors").write_bytes(b"")
    write_index(biased, {"weight_map": {"model.norm.weight": name}})
    with pytest.raises((ValueError, FileNotFoundError), match="outside its folder|lacks"):
        Checkpoint(biased)


def test_file_that_is_no_regular_file_is_refused_unopened(biased):
    path = biased / "model-00001-of-00002.safetensors"
    path.unlink()
    os.mkfifo(path)  # to open it would wait for a writer
    with pytest.raises(FileNotFoundError, match=f"lacks {path.name}"):
        Checkpoint(biased)


def write_index(folder: pathlib.Path, index) -> None:
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "index",
    [{}, [], None, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {"a": ["b"]}}],
    ids=str,
)
def test_index_without_a_usable_weight_map_is_named(biased, index):
    write_index(biased, index)
    with pytest.raises(ValueError, match=f"{INDEX_FILE} has no usable weight_map"):
        Checkpoint(biased)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "half", "not UTF-8", "too deep"]
)
def test_index_that_is_not_json_is_named(biased, content):
    (biased / INDEX_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{INDEX_FILE} has no usable weight_map"):
        Checkpoint(biased)


@pytest.mark.parametrize("name", ["llama3", "llama_tied", "qwen3"])
def test_progress_counts_every_file_once(tmp_path, name):
    folder = write(VARIANTS[name], tmp_path)
    checkpoint, abstract = Checkpoint(folder), abstract_params(folder)
    news = []
    progress = ShardProgress(checkpoint, abstract, lambda *news_of_file: news.append(news_of_file))
    load_params(checkpoint, abstract, on_bytes=progress)
    total = VARIANTS[name].shards
    assert [(done, of) for done, of, _ in news] == [(i + 1, total) for i in range(total)]
    gigabytes = sum(tensor.nbytes for tensor in tensors_in(folder).values()) / 1e9
    assert news[-1][2] == pytest.approx(gigabytes)


def test_progress_does_not_wait_for_tensors_that_are_not_read(tmp_path):
    folder = write(VARIANTS["llama_tied"], tmp_path)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    checkpoint, abstract = Checkpoint(folder), abstract_params(folder)
    news = []
    progress = ShardProgress(checkpoint, abstract, lambda done, of, _: news.append((done, of)))
    load_params(checkpoint, abstract, on_bytes=progress)
    assert news == [(1, 1)]


ON_SEVERAL_DEVICES = """
import itertools, pathlib, sys
import jax, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import create_model
from jaxserve.models.weights import Checkpoint, ShardProgress, load_params

devices = np.array(jax.devices())
two = Mesh(devices[:2].reshape(1, 2), ("data", "model"))
four = Mesh(devices.reshape(2, 2), ("data", "model"))

def shard(leaf, mesh):
    axes = leaf.get_metadata()["axes"]
    cut = ["expert"] if "expert" in axes else ["kv_heads", "heads", "mlp", "vocab"]
    spec = ["model" if axis in cut else None for axis in axes]
    return leaf.replace(NamedSharding(mesh, PartitionSpec(*spec)))


for folder, mesh in itertools.product(map(pathlib.Path, sys.argv[1:]), (two, four)):
    config = ModelConfig.from_pretrained(folder)
    abstract = create_model(config, dtype="float32")[1]
    flat = nnx.to_flat_state(abstract)
    shardings = nnx.from_flat_state({tuple(path): shard(leaf, mesh) for path, leaf in flat})
    checkpoint = Checkpoint(folder)
    news = []
    progress = ShardProgress(checkpoint, abstract, lambda done, of, _: news.append((done, of)))
    sharded = nnx.to_flat_state(load_params(checkpoint, abstract, shardings, on_bytes=progress))
    whole = nnx.to_flat_state(load_params(checkpoint, abstract))
    num_cut = 0
    for (path, expected), (_, loaded), (_, leaf) in zip(whole, sharded, flat, strict=True):
        assert loaded[...].sharding == shard(leaf, mesh).get_value()
        np.testing.assert_array_equal(loaded[...], expected[...], err_msg=str(path))
        num_cut += not loaded[...].sharding.is_fully_replicated
    assert num_cut > 3 * config.num_layers, num_cut
    files = len(checkpoint.files)
    assert news == [(i + 1, files) for i in range(files)], news
"""


def test_loading_onto_several_devices_equals_loading_onto_one(tmp_path):
    """Cut over two of them, and over two pairs that hold the same."""
    names = ("llama_biases", "llama3", "mixtral_window")
    folders = [write(VARIANTS[name], tmp_path / name) for name in names]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", ON_SEVERAL_DEVICES, *folders],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]

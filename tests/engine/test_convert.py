"""`jaxserve convert`: bit for bit there and back, in several files, in whole or not at all."""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from orbax.checkpoint import v1

from jaxserve import checksums, converter
from jaxserve.config import EngineConfig
from jaxserve.convert import main, parse_size
from jaxserve.model_loader import ModelFiles
from jaxserve.models.checkpoint import INDEX_FILE, Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.load_format import open_checkpoint
from jaxserve.models.registry import create_model
from jaxserve.models.safetensors_file import DTYPES, Tensor
from jaxserve.models.safetensors_writer import write_safetensors
from jaxserve.models.weights import load_params
from tests.golden.pooled.cases import write_modules
from tests.server.serving import DEMO_MODEL

OTHER_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def convert(source, target, **options) -> pathlib.Path:
    defaults = {"to": None, "dtype": None, "max_file_bytes": 1 << 30}
    converter.convert(pathlib.Path(source), pathlib.Path(target), **defaults | options)
    return target


def content(folder: pathlib.Path) -> dict[str, tuple]:
    checkpoint = open_checkpoint(folder)
    arrays = {name: checkpoint.read(name) for name in checkpoint.names()}
    checkpoint.close()
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    folder.mkdir()
    headers = {name: Tensor(array.dtype, array.shape, 0) for name, array in tensors.items()}
    write_safetensors(folder, headers, tensors.__getitem__, 1 << 30)
    return folder


def test_there_and_back_in_several_files_with_all_that_belongs_to_it(tmp_path):
    orbax = convert(DEMO_MODEL, tmp_path / "orbax", max_file_bytes=500_000)
    back = convert(orbax, tmp_path / "back", max_file_bytes=500_000)
    assert content(orbax) == content(back) == content(pathlib.Path(DEMO_MODEL))
    shards = sorted(back.glob("*.safetensors"))
    index = json.loads((back / INDEX_FILE).read_text())
    assert len(shards) > 5 and set(index["weight_map"].values()) == {s.name for s in shards}
    assert index["metadata"]["total_size"] == sum(len(c[2]) for c in content(back).values())
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    by_library = {n: t for s in shards for n, t in safetensors.numpy.load_file(s).items()}
    assert {n: t.tobytes() for n, t in by_library.items()} == {
        n: c[2] for n, c in content(back).items()
    }
    data = [path for path in orbax.rglob("d/*") if path.stat().st_size > 50_000]
    assert len(data) > 3 and max(path.stat().st_size for path in data) < 2_000_000
    for folder in (orbax, back):
        for name in OTHER_FILES:
            assert (folder / name).read_bytes() == pathlib.Path(DEMO_MODEL, name).read_bytes()
        sums = subprocess.run(
            ["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, capture_output=True
        )
        assert sums.returncode == 0, sums.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "orbax"]


def test_orbax_itself_reads_what_was_written(tmp_path):
    orbax = convert(DEMO_MODEL, tmp_path / "orbax")
    tree = v1.load(orbax / converter.ORBAX_FOLDER)
    expected = content(pathlib.Path(DEMO_MODEL))
    assert {name: np.asarray(array).tobytes() for name, array in tree.items()} == {
        name: bytes_ for name, (_, _, bytes_) in expected.items()
    }


def test_large_tensors_are_in_chunks(tmp_path, monkeypatch):
    """Along both axes, so that a device reads little beyond its part, however it is cut."""
    monkeypatch.setattr("jaxserve.models.orbax_writer.CHUNK_BYTES", 1 << 13)
    orbax = convert(DEMO_MODEL, tmp_path / "orbax")
    checkpoint = open_checkpoint(orbax)
    name = "model.embed_tokens.weight"
    shape = checkpoint.tensor(name).shape
    chunk = checkpoint.file_of(name)._arrays[name].chunk_layout.read_chunk.shape
    checkpoint.close()
    print(shape, chunk)
    assert np.prod(chunk) * 2 <= 1 << 13 and all(c < n for c, n in zip(chunk, shape, strict=True))
    assert content(orbax) == content(pathlib.Path(DEMO_MODEL))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, 6 * 5 * dtype.itemsize, np.uint8)
    matrix = (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(6, 5)
    tensors = {"matrix": matrix, "scale": matrix[0, 0].reshape(()), "row": matrix[1]}
    source = write(tmp_path / "source", tensors)
    assert content(source)["scale"][:2] == (dtype, ()), "a scale has no axis"
    orbax = convert(source, tmp_path / "orbax")
    assert content(orbax) == content(convert(orbax, tmp_path / "back")) == content(source)


def test_tree_that_is_fused_is_written_in_the_checkpoints_names(tmp_path):
    abstract = create_model(ModelConfig.from_pretrained(DEMO_MODEL))[1]
    source = tmp_path / "source"
    v1.save(source, nnx.to_pure_dict(load_params(Checkpoint(DEMO_MODEL), abstract)))
    shutil.copy(f"{DEMO_MODEL}/config.json", source)
    back = convert(source, tmp_path / "back")
    assert content(back) == content(pathlib.Path(DEMO_MODEL))
    assert sorted(path.name for path in back.iterdir()) == [
        "SHA256SUMS", "config.json", "model.safetensors"
    ]  # fmt: skip


def test_model_that_nobody_serves_is_converted_too(tmp_path):
    source = write(tmp_path / "source", {"h.0.qkv_proj.weight": np.ones((4, 4), np.float16)})
    (source / "config.json").write_text('{"architectures": ["GPT2"]}')
    orbax = convert(source, tmp_path / "orbax")
    assert content(convert(orbax, tmp_path / "back")) == content(source)


def test_cast_is_told_to_the_config(tmp_path):
    target = convert(DEMO_MODEL, tmp_path / "wide", dtype="float32", to="safetensors")
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float32"
    for name, (dtype, shape, raw) in content(pathlib.Path(DEMO_MODEL)).items():
        expected = np.frombuffer(raw, dtype).reshape(shape).astype(np.float32)
        assert content(target)[name] == (np.float32, shape, expected.tobytes())


def test_infinities_that_were_there_are_cast_too(tmp_path):
    wide = np.float32([np.inf, -np.inf, np.nan, 1.5, 65504])
    source = write(tmp_path / "source", {"a": wide})
    cast = content(convert(source, tmp_path / "target", dtype="float16", to="safetensors"))
    assert cast["a"] == (np.float16, (5,), wide.astype(np.float16).tobytes())


def embedding_model(folder: pathlib.Path) -> pathlib.Path:
    """As sentence-transformers saves one, and a module that has weights of its own."""
    shutil.copytree(DEMO_MODEL, folder)
    write_modules(folder, "mean", is_normalized=False)
    return folder


def test_embedding_model_keeps_its_pooling(tmp_path):
    source = embedding_model(tmp_path / "source")
    there = convert(source, tmp_path / "there")
    back = convert(there, tmp_path / "back")
    for folder in (source, there, back):
        pooling = ModelFiles.find(
            EngineConfig(model_path=str(folder), is_embedding=True)
        ).config.pooling
        print(folder.name, pooling)
        assert (pooling.mode, pooling.is_normalized) == ("mean", False)


def test_all_files_of_a_module_are_kept(tmp_path):
    """Of one that is not served too, but for a folder that is empty and so was not kept."""
    source = embedding_model(tmp_path / "source")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_N": "Normalize"}
    modules = [{"path": path, "type": f"a.b.{kind}"} for path, kind in kinds.items()]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "2_Dense" / "inner").mkdir(parents=True)
    write(source / "2_Dense" / "weights", {"linear.weight": np.ones((4, 4), np.float32)})
    (source / "2_Dense" / "inner" / "vocabulary.bin").write_bytes(b"\0\1")
    target = convert(source, tmp_path / "target")
    names = ["1_Pooling/config.json", "2_Dense/weights/model.safetensors"]
    for name in (*names, "2_Dense/inner/vocabulary.bin", "modules.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "3_N").exists()


# What is not written, and leaves nothing.


def refused(capsys, *arguments: object) -> str:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 1 and captured.err.startswith("jaxserve convert: ")
    print(captured.err)
    return captured.err


def test_target_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "link").symlink_to("nowhere")
    for target in (tmp_path, tmp_path / "link"):
        assert f"{target} is there already" in refused(capsys, DEMO_MODEL, target)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_folder_that_is_not_there_is_named_as_it_was_given(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for target, words in {"no/such": "No such file or directory", "file/x": "Not a dir"}.items():
        assert f": {target}: {words}" in refused(capsys, DEMO_MODEL, target)


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_source_that_is_not_what_its_checksums_say(tmp_path, capsys, to):
    """One bit of the largest file, whichever format that is in; before anything else is done."""
    source = convert(DEMO_MODEL, tmp_path / "source", to=to)
    largest = max(source.rglob("*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[-1000] ^= 1
    largest.write_bytes(damaged)
    words = refused(capsys, source, tmp_path / "target")
    assert f"{largest.relative_to(source)} is not what {checksums.FILE} says" in words
    (source / checksums.FILE).write_text(f"{'0' * 64}  another\n")
    assert f"{checksums.FILE} does not list" in refused(capsys, source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bytes_that_are_read_add_up_to_all(tmp_path):
    """Twice those of a source with checksums."""
    source = convert(DEMO_MODEL, tmp_path / "source", to="safetensors")
    for folder in (pathlib.Path(DEMO_MODEL), source):
        counts, totals = [], set()

        def on_bytes(count: int, total: int, counts=counts, totals=totals) -> None:
            counts.append(count)
            totals.add(total)

        convert(folder, tmp_path / f"of_{folder.name}", on_bytes=on_bytes)
        (total,) = totals
        assert sum(counts) == total
        size = (folder / "model.safetensors").stat().st_size
        assert total > 2 * 0.95 * size if folder == source else total < size


FAULTS = {
    "no such source": (lambda s: shutil.rmtree(s), [], "Cannot find any model weights"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), [], "Cannot find any model"),
    "truncated": (
        lambda s: os.truncate(s / "model.safetensors", 1000),
        [],
        "model.safetensors: ",
    ),
    "no elements": (
        lambda s: safetensors.numpy.save_file({"a": np.ones((0, 4))}, s / "model.safetensors"),
        [],
        "a: orbax does not hold a tensor without elements",
    ),
    "too large for the cast": (
        lambda s: (
            shutil.rmtree(s),
            write(s, {"a": np.float32([1]), "b": np.array([2, -1e6], ml_dtypes.bfloat16)}),
        ),
        ["--dtype", "float16"],
        "--dtype: b holds 999424, which is too large for float16",
    ),
    "module without its folder": (
        lambda s: (write_modules(s, "mean"), shutil.rmtree(s / "1_Pooling")),
        [],
        "source/1_Pooling is missing, which modules.json names",
    ),
    "module elsewhere": (
        lambda s: (s / "modules.json").write_text('[{"type": "Pooling", "path": "../other"}]'),
        [],
        "modules.json names a folder outside its own: '../other'",
    ),
    "cast of FP8": (
        lambda s: (
            shutil.rmtree(s),
            write(s, {"a": np.ones(4, ml_dtypes.float8_e4m3fn)}),
        ),
        ["--dtype", "bfloat16"],
        "--dtype: a is float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_told_and_leaves_nothing(tmp_path, capsys, name):
    break_it, flags, words = FAULTS[name]
    shutil.copytree(DEMO_MODEL, tmp_path / "source")
    break_it(tmp_path / "source")
    assert words in refused(capsys, tmp_path / "source", tmp_path / "target", *flags)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_source_that_is_rewritten_meanwhile(tmp_path, monkeypatch, capsys, to):
    source = shutil.copytree(DEMO_MODEL, tmp_path / "source")

    def read(checkpoint, name, original=Checkpoint.read):
        os.utime(source / "model.safetensors")
        return original(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", read)
    assert "was rewritten" in refused(capsys, source, tmp_path / "target", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_dtype_that_safetensors_lack(tmp_path, capsys):
    v1.save(tmp_path / "source", {"a": np.ones((4, 4), np.complex128)})
    words = refused(capsys, tmp_path / "source", tmp_path / "target")
    assert "a: safetensors has no dtype complex128" in words


def test_path_that_orbax_takes_for_a_pattern(tmp_path, capsys):
    (tmp_path / "[a]").mkdir()
    assert "with any of * ? [" in refused(capsys, DEMO_MODEL, tmp_path / "[a]" / "target")
    assert not list((tmp_path / "[a]").iterdir())


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500mb", "7 K", "12")] == [
        5_000_000_000, 500_000_000, 7000, 12
    ]  # fmt: skip
    for text in ("", "0", "5TB", "-1", "GB"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
            parse_size(text)


def test_command_line_converts_on_the_cpu_and_its_help_loads_no_jax(tmp_path):
    script = (
        "import sys\n"
        "from jaxserve.server.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', {'jax', 'orbax'} & set(sys.modules))\n"
        f"status = main(['convert', {DEMO_MODEL!r}, {str(tmp_path / 'orbax')!r}])\n"
        "import jax; print('status', status, 'on', jax.config.jax_platforms)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    print(done.stdout)
    assert "--max-shard-size" in done.stdout and "loaded: set()" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "status 0 on cpu"
    assert (tmp_path / "orbax" / "config.json").exists()

"""Checkpoints that must not be served: each is refused in words, and nothing else has changed."""

import json
import os
import pathlib
import shutil
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxserve import Engine
from jaxserve.models.safetensors_file import SafetensorsFile
from tests.engine.reloading import (
    FILE,
    nothing_changes,
    output,
    outputs,
    refused,
    shard,
    write_variant,
)
from tests.server.serving import DEMO_MODEL, SMALL, programs_folder, wait_for

NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def engine(pytestconfig, root):
    with Engine(
        model_path=DEMO_MODEL,
        compilation_cache_dir=programs_folder(pytestconfig),
        weights_root=str(root),
        **SMALL,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine) -> list[list[int]]:
    return outputs(engine)


@pytest.fixture
def folder(root, request) -> pathlib.Path:
    """Of other weights, which are sound."""
    folder = write_variant(root / request.node.name.replace("/", "_"))
    yield folder
    shutil.rmtree(folder)


def edit(folder: pathlib.Path, change) -> None:
    """Rewrites the only file; `change` is given its tensors."""
    tensors = dict(safetensors.numpy.load_file(folder / FILE))
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / FILE)


def edit_json(folder: pathlib.Path, name: str, **changes) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def with_value(name: str, value: float):
    """The last value of a tensor is another."""

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[-1] = value

    return lambda folder: edit(folder, change)


def truncate(size):
    return lambda folder: os.truncate(folder / FILE, size((folder / FILE).stat().st_size))


def damage_header(folder: pathlib.Path) -> None:
    with (folder / FILE).open("r+b") as file:
        file.seek(20)
        file.write(b"\0")


def flip_bit(folder: pathlib.Path) -> None:
    """In the middle of the data, where it makes no NaN."""
    with (folder / FILE).open("r+b") as file:
        file.seek(1_000_001)
        (byte,) = file.read(1)
        file.seek(1_000_001)
        file.write(bytes([byte ^ 1]))


def write_checksums(folder: pathlib.Path) -> None:
    status = os.system(f"cd '{folder}' && sha256sum *.safetensors > SHA256SUMS")
    assert status == 0


def flip_bit_after_the_checksum(folder: pathlib.Path) -> None:
    write_checksums(folder)
    flip_bit(folder)


def lose_a_shard(folder: pathlib.Path) -> None:
    shard(folder)[1].unlink()


def leave_an_old_shard(folder: pathlib.Path) -> None:
    paths = shard(folder)
    shutil.copy(paths[0], folder / "model-00003-of-00003.safetensors")


def copy_the_file(folder: pathlib.Path) -> None:
    shutil.copy(folder / FILE, folder / "again.safetensors")


def replace_by(make):
    def change(folder: pathlib.Path) -> None:
        (folder / FILE).unlink()
        make(folder / FILE)

    return change


def other_tokenizer(folder: pathlib.Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def config(**changes):
    return lambda folder: edit_json(folder, "config.json", **changes)


FAULTS = {
    "empty folder": (lambda folder: (folder / FILE).unlink(), "Cannot find any model weights"),
    "missing shard": (lose_a_shard, "lacks model-00002-of-00002.safetensors"),
    "extra shard": (leave_an_old_shard, "the index does not name model-00003-of-00003"),
    "tensors in two files": (copy_the_file, "is in both again.safetensors and model.safetensors"),
    "truncated by a byte": (truncate(lambda size: size - 1), FILE),
    "truncated by half": (truncate(lambda size: size // 2), FILE),
    "truncated to nothing": (truncate(lambda size: 0), f"{FILE}: too short"),
    "a byte too long": (truncate(lambda size: size + 1), FILE),
    "damaged header": (damage_header, f"{FILE}: header is not JSON"),
    "flipped bit": (flip_bit_after_the_checksum, f"{FILE} is not what SHA256SUMS says"),
    "missing tensor": (lambda f: edit(f, lambda t: t.pop(UP)), f"missing: {UP}"),
    "extra tensor": (lambda f: edit(f, lambda t: t.update(x=t[UP])), "not in the model: x"),
    "wrong shape": (lambda f: edit(f, lambda t: t.update({UP: t[UP][1:]})), f"wrong shape: {UP}"),
    "wrong dtype": (
        lambda f: edit(f, lambda t: t.update({UP: t[UP].astype(np.int8)})),
        f"not floating point: {UP}",
    ),
    "NaN": (with_value(Q, np.nan), f"{Q} holds NaN or infinity"),
    "infinity": (with_value(NORM, -np.inf), f"{NORM} holds NaN or infinity"),
    "other architecture": (
        config(architectures=["LlamaForCausalLM"], model_type="llama"),
        "architecture is 'LlamaForCausalLM', serving 'Qwen2ForCausalLM'",
    ),
    "architecture that nobody serves": (config(architectures=["GPT2"]), "are not served"),
    "other size": (config(num_hidden_layers=7), "num_layers is 7, serving"),
    "other rope": (config(rope_theta=9.0, rope_parameters=None), "rope is RopeConfig"),
    "other end of sequence": (
        lambda f: edit_json(f, "generation_config.json", eos_token_id=[5]),
        "eos_token_ids is",
    ),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "other tokenizer": (other_tokenizer, "tokenizer.json is another (keep_tokenizer accepts it"),
    "other eos token": (
        lambda f: edit_json(f, "tokenizer_config.json", eos_token="a"),
        "tokenizer_config.json is another",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json is not sound",
    ),
    "pipe": (replace_by(os.mkfifo), f"lacks {FILE}"),
    "device": (replace_by(lambda path: path.symlink_to("/dev/zero")), f"lacks {FILE}"),
    "link to elsewhere": (
        replace_by(lambda path: path.symlink_to(f"{DEMO_MODEL}/{FILE}")),
        "is not below --weights-root",
    ),
    "pipe for a config": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "is no regular file",
    ),
    "pipe for checksums": (lambda f: os.mkfifo(f / "SHA256SUMS"), "is no regular file"),
    "checksums of other files": (
        lambda f: (f / "SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\n"),
        f"SHA256SUMS does not list {FILE}",
    ),
    "checksums that are none": (lambda f: (f / "SHA256SUMS").write_text("no"), "no line of sha256"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_told_and_changes_nothing(engine, expected, folder, name):
    break_it, words = FAULTS[name]
    break_it(folder)
    with nothing_changes(engine, expected):
        message = refused(engine, folder)
        assert words in message
        assert message.startswith("Failed to ")
        if message.startswith("Failed to update weights: "):
            assert message.endswith(".\nRolling back to original weights.")


@pytest.mark.parametrize("path", ["/dev/zero", "/etc", "/", DEMO_MODEL])
def test_path_outside_the_root(engine, expected, path):
    with nothing_changes(engine, expected):
        assert "is not below --weights-root" in refused(engine, path)


def test_every_difference_is_named_at_once(engine, expected, folder):
    def change(tensors):
        del tensors[UP], tensors[NORM]
        tensors[Q] = tensors[Q][1:]
        tensors["x"] = tensors[Q]

    edit(folder, change)
    with nothing_changes(engine, expected):
        message = refused(engine, folder)
        assert all(name in message for name in (UP, NORM, Q, "not in the model: x"))


# While it is read.


def at_read(monkeypatch, number: int, happen) -> None:
    """`happen` is called before the file is read for the `number`th time."""
    reads = []

    def read_into(file, *args, read_into=SafetensorsFile.read_into):
        reads.append(args)
        if len(reads) == number:
            happen()
        read_into(file, *args)

    monkeypatch.setattr(SafetensorsFile, "read_into", read_into)


def overwrite(path: pathlib.Path) -> None:
    with path.open("r+b") as file:
        file.seek(2_000_000)
        file.write(bytes(100))


def replace(path: pathlib.Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize(
    "happen,words",
    [
        (lambda path: os.truncate(path, 1_000_000), "was it rewritten?"),
        (lambda path: os.truncate(path, 0), "was it rewritten?"),
        (overwrite, "was rewritten while it was read"),
        (replace, "was rewritten while it was read"),
    ],
    ids=["truncated", "emptied", "overwritten", "replaced"],
)
def test_file_rewritten_while_it_is_read(engine, expected, folder, monkeypatch, happen, words):
    with nothing_changes(engine, expected):
        at_read(monkeypatch, 5, lambda: happen(folder / FILE))
        assert words in refused(engine, folder)


def test_disk_that_fails(engine, expected, folder, monkeypatch):
    def fail():
        raise OSError(5, "Input/output error", "the disk")

    with nothing_changes(engine, expected):
        at_read(monkeypatch, 5, fail)
        assert "the disk: Input/output error" in refused(engine, folder)


def test_serving_goes_on_while_a_disk_is_silent(engine, expected, folder, monkeypatch):
    """One that never answers is given up, and is not in the way of the next update."""
    answers, loader = threading.Event(), engine._core._control._loader
    broken = write_variant(folder / "broken")
    lose_a_shard(broken)
    monkeypatch.setattr(loader, "timeout", 1.0)
    with nothing_changes(engine, expected):
        with monkeypatch.context() as patched:
            at_read(patched, 5, lambda: answers.wait(60))
            update = engine._frontend.call("update_weights", model_path=str(folder))
            served = 0
            while not update.done():
                assert output(engine) == expected[0]
                served += 1
        print(f"{served} requests were served meanwhile")
        assert served > 3
        assert "no byte was read for 1 s (--weight-load-timeout)" in str(update.exception())
        assert "lacks" in refused(engine, broken)
        answers.set()
        wait_for(lambda: not any(t.name == "jaxserve-weights" for t in threading.enumerate()), 5)


# What is no fault.


@pytest.fixture
def back(engine, root, expected):
    """To the demo model's weights, after the test."""
    yield
    path = root / "demo"
    if not path.exists():
        write_variant(path, seed=None)
    engine.update_weights_from_disk(str(path), weight_version="default")
    assert output(engine) == expected[0]


def last_update(engine) -> dict:
    return engine._frontend.call("internal_state").result()["last_update"]


def test_checksums_that_hold_are_reported(engine, folder, back):
    engine.update_weights_from_disk(str(folder))
    assert last_update(engine)["is_checksummed"] is False
    write_checksums(folder)
    engine.update_weights_from_disk(str(folder))
    assert last_update(engine)["is_checksummed"] is True


def test_weights_that_are_all_zeros_are_taken_and_reported(engine, folder, back):
    edit(folder, lambda tensors: tensors.update({UP: np.zeros_like(tensors[UP])}))
    engine.update_weights_from_disk(str(folder))
    assert last_update(engine)["all_zero_tensors"] == [UP]
    edit(folder, lambda t: t.update({name: np.zeros_like(value) for name, value in t.items()}))
    engine.update_weights_from_disk(str(folder))
    assert len(set(output(engine))) == 1, "constant scores"
    assert len(last_update(engine)["all_zero_tensors"]) > 20


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_other_floats_are_cast_as_at_the_start(engine, folder, back, dtype):
    engine.update_weights_from_disk(str(folder))
    served = output(engine)
    edit(folder, lambda t: t.update({name: value.astype(dtype) for name, value in t.items()}))
    engine.update_weights_from_disk(str(folder))
    assert output(engine) == served or dtype == np.float16


def test_shards_and_single_files_are_the_same(engine, folder, back):
    engine.update_weights_from_disk(str(folder))
    served = outputs(engine)
    shard(folder, 3)
    engine.update_weights_from_disk(str(folder))
    assert outputs(engine) == served


def test_folder_with_nothing_but_weights(engine, folder, back):
    for path in folder.iterdir():
        if path.name != FILE:
            path.unlink()
    engine.update_weights_from_disk(str(folder))


def test_tokenizer_that_is_only_written_otherwise_is_the_same(engine, folder, back):
    content = json.loads((folder / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in merges]
    content["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    edit_json(folder, "tokenizer_config.json", chat_template="other")
    engine.update_weights_from_disk(str(folder))


def test_other_tokenizer_and_end_of_sequence_if_asked_for(engine, folder, back):
    other_tokenizer(folder)
    edit_json(folder, "generation_config.json", eos_token_id=[5])
    assert "eos_token_ids" in refused(engine, folder)
    engine.update_weights_from_disk(str(folder), keep_tokenizer=True)
    edit_json(folder, "config.json", rope_theta=9.0, rope_parameters=None)
    assert "rope is" in refused(engine, folder, keep_tokenizer=True)

"""An engine that starts from an orbax checkpoint, and is reloaded from orbax and safetensors."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
from orbax.checkpoint import v1

from jaxserve import Engine, make_step
from jaxserve.checksums import FILE as SUMS
from jaxserve.compile_counter import CompileCounter
from jaxserve.converter import ORBAX_FOLDER, convert
from jaxserve.model_loader import ModelFiles
from jaxserve.models.config import ModelConfig
from jaxserve.models.orbax_arrays import OrbaxArrays
from jaxserve.served_weights import ServedWeights
from tests.engine.reloading import (
    FILE,
    live_bytes,
    nothing_changes,
    output,
    outputs,
    refused,
    write_variant,
)
from tests.server.serving import DEMO_MODEL, SMALL, programs_folder, wait_for

NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def to_orbax(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    convert(source, target, to="orbax", dtype=None, max_file_bytes=1 << 30)
    return target


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """With the demo model and one of other weights, each in both formats."""
    root = tmp_path_factory.mktemp("weights")
    shutil.copytree(DEMO_MODEL, root / "demo")
    write_variant(root / "other")
    for name in ("demo", "other"):
        to_orbax(root / name, root / f"{name}-orbax")
    return root


@pytest.fixture(scope="module")
def engine(pytestconfig, root):
    with Engine(
        model_path=str(root / "demo-orbax"),
        load_format="orbax",
        compilation_cache_dir=programs_folder(pytestconfig),
        **SMALL,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine, root) -> dict[str, list[list[int]]]:
    """What each version answers: as it was started, and as safetensors give it."""
    started = outputs(engine)
    by_name = {}
    for name in ("other", "demo"):
        engine.update_weights_from_disk(str(root / name))
        by_name[name] = outputs(engine)
    assert started == by_name["demo"] and started != by_name["other"]
    print(by_name)
    return by_name


@pytest.fixture(autouse=True)
def demo(engine, expected, root):
    engine.update_weights_from_disk(str(root / "demo"), weight_version="default")
    wait_for(engine.flush_cache, 5)


@pytest.fixture
def folder(root, request) -> pathlib.Path:
    """Of other weights, in orbax's format, which are sound."""
    folder = root / request.node.name.translate(str.maketrans("/[]", "___"))
    shutil.copytree(root / "other-orbax", folder)
    yield folder
    shutil.rmtree(folder)


def test_start_from_orbax_is_the_start_from_safetensors(engine, expected, root):
    """Asserted where `expected` is made; this is the same of the parameters' bytes."""
    weights = ServedWeights(engine._core.abstract_params, engine._core._runner)
    served = weights.checksum()
    engine.update_weights_from_disk(str(root / "demo-orbax"), load_format="orbax")
    assert weights.checksum() == served
    engine.update_weights_from_disk(str(root / "other-orbax"))
    assert weights.checksum() != served


def test_reloads_alternate_exactly_between_the_formats_and_compile_nothing(engine, expected, root):
    wait_for(engine.flush_cache, 5)
    counter, size, fds = CompileCounter(), live_bytes(), len(os.listdir("/proc/self/fd"))
    for load_format in ("orbax", "auto", None):
        for name in ("other-orbax", "demo", "other", "demo-orbax"):
            asked = load_format if "orbax" in name else "auto"
            fields = {} if asked is None else {"load_format": asked}
            engine.update_weights_from_disk(str(root / name), **fields)
            assert output(engine) == expected[name.removesuffix("-orbax")][0], (name, asked)
    counter.close()
    wait_for(engine.flush_cache, 5)
    print(counter.report(), live_bytes(), size)
    assert not any(counter.report().values())
    assert len(os.listdir("/proc/self/fd")) == fds
    assert live_bytes() == size


@pytest.mark.parametrize("way", ["host", "in-place"])
def test_other_ways_to_place_them(engine, expected, root, monkeypatch, way):
    monkeypatch.setattr(engine._core._control._loader, "way", way)
    engine.update_weights_from_disk(str(root / "other-orbax"))
    assert outputs(engine) == expected["other"]


def test_what_step_prepare_returned_is_served(engine, expected, root):
    step = make_step(ModelConfig.from_pretrained(DEMO_MODEL), max_rows=4, max_len=64)
    prepared = step.prepare(safetensors.numpy.load_file(root / "other" / FILE))
    v1.save(root / "prepared", prepared)
    engine.update_weights_from_disk(str(root / "prepared"))
    assert outputs(engine) == expected["other"]


def test_checksums_are_of_all_its_files(engine, root, folder):
    lines = (folder / SUMS).read_text().splitlines()
    assert any("/_METADATA" in line for line in lines)
    (folder / SUMS).write_text("\n".join(lines[:-1]) + "\n")
    assert f"{SUMS} does not list {lines[-1].split('  ')[1]}" in refused(engine, folder)


def test_digest_of_a_recorded_run_follows_what_the_files_hold(engine, folder):
    files = ModelFiles.find(engine._frontend.config)
    before = files.digest("orbax")
    assert before == files.digest("auto") != files.digest("dummy")
    config = ModelFiles(str(folder), files.config, files.model_type, files.overrides)
    assert config.digest("orbax") != before


# What is not served.


def rewrite(change):
    """The checkpoint, with other tensors; `change` is given them."""

    def apply(folder: pathlib.Path) -> None:
        work = folder.with_name("work")
        convert(folder, work, to="safetensors", dtype=None, max_file_bytes=1 << 30)
        tensors = dict(safetensors.numpy.load_file(work / FILE))
        change(tensors)
        safetensors.numpy.save_file(tensors, work / FILE)
        (work / "SHA256SUMS").unlink()  # of what was there before
        shutil.rmtree(folder)
        to_orbax(work, folder)
        shutil.rmtree(work)

    return apply


def largest(folder: pathlib.Path) -> pathlib.Path:
    paths = (folder / ORBAX_FOLDER).rglob("*")
    return max(paths, key=lambda path: path.is_file() * path.stat().st_size)


def flip_bit(folder: pathlib.Path) -> None:
    with largest(folder).open("r+b") as file:
        file.seek(1001)
        (byte,) = file.read(1)
        file.seek(1001)
        file.write(bytes([byte ^ 1]))


def without_sums(break_it):
    def apply(folder: pathlib.Path) -> None:
        (folder / SUMS).unlink()
        break_it(folder)

    return apply


def truncate(folder: pathlib.Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def link_a_file_outside(folder: pathlib.Path) -> None:
    path = largest(folder)
    outside = path.rename(folder.parent.with_name("outside"))
    path.symlink_to(outside)


def link_the_checkpoint_outside(folder: pathlib.Path) -> None:
    outside = folder.parent.with_name("outside-orbax")
    shutil.rmtree(outside, ignore_errors=True)
    (folder / ORBAX_FOLDER).rename(outside)
    (folder / ORBAX_FOLDER).symlink_to(outside)


def interrupt(folder: pathlib.Path) -> None:
    (folder / ORBAX_FOLDER).rename(folder / f"{ORBAX_FOLDER}.orbax-checkpoint-tmp-7")


def pipe(folder: pathlib.Path) -> None:
    path = largest(folder)
    path.unlink()
    os.mkfifo(path)


def set_last(name: str, value: float):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[-1] = value

    return rewrite(change)


def other_config(folder: pathlib.Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))


FAULTS = {
    "unfinished": (interrupt, "is not finished"),
    "truncated": (without_sums(truncate), "OUT_OF_RANGE"),
    "flipped bit": (flip_bit, f"is not what {SUMS} says"),
    "link to a file outside": (link_a_file_outside, "is not below --weights-root"),
    "link to a folder outside": (link_the_checkpoint_outside, "is not below --weights-root"),
    "pipe": (pipe, "is no regular file"),
    "none": (lambda f: shutil.rmtree(f / ORBAX_FOLDER), "Cannot find any orbax checkpoint with"),
    "two": (lambda f: shutil.copytree(f / ORBAX_FOLDER, f / "b"), "several orbax checkpoints"),
    "NaN": (set_last(Q, np.nan), f"{Q} holds NaN or infinity"),
    "other config": (other_config, "num_layers is 7, serving 6"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_told_and_changes_nothing(engine, expected, folder, name):
    break_it, words = FAULTS[name]
    break_it(folder)
    with nothing_changes(engine, expected["demo"]):
        message = refused(engine, folder, load_format="orbax")
        assert words in message and "jaxserve-orbax-" not in message
        assert message.startswith("Failed to ")


def test_every_difference_is_named_at_once(engine, expected, folder, monkeypatch):
    def change(tensors):
        del tensors[UP], tensors[NORM]
        tensors["x"] = tensors[Q]
        tensors[Q] = tensors[Q][1:]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((384, 128), np.int8)

    rewrite(change)(folder)
    monkeypatch.setattr(OrbaxArrays, "read_box", None)  # nothing is read
    with nothing_changes(engine, expected["demo"]):
        message = refused(engine, folder)
    assert f"missing: {UP}, {NORM}" in message or f"missing: {NORM}, {UP}" in message
    assert "not in the model: x" in message
    assert f"wrong shape: {Q} (checkpoint [127, 128], model [128, 128])" in message
    assert "not floating point: model.layers.3.mlp.up_proj.weight (int8)" in message


def overwrite(path: pathlib.Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(bytes(100))


def swap_for_a_link(path: pathlib.Path) -> None:
    copy = shutil.copy(path, path.parents[4] / "elsewhere")
    path.unlink()
    path.symlink_to(copy)


@pytest.mark.parametrize("happen", [overwrite, swap_for_a_link])
def test_file_rewritten_while_it_is_read(engine, expected, folder, monkeypatch, happen):
    (folder / SUMS).unlink()
    path, reads = largest(folder), []

    def read_box(arrays, *args, original=OrbaxArrays.read_box):
        reads.append(args)
        if len(reads) == 5:
            happen(path)
        original(arrays, *args)

    monkeypatch.setattr(OrbaxArrays, "read_box", read_box)
    with nothing_changes(engine, expected["demo"]):
        assert "was rewritten while it was read" in refused(engine, folder)
    assert len(reads) > 50


@pytest.mark.parametrize("load_format", ["orbax", "safetensors"])
def test_format_that_is_asked_for_is_the_one_that_is_read(engine, expected, root, load_format):
    other = "demo" if load_format == "orbax" else "demo-orbax"
    with nothing_changes(engine, expected["demo"]):
        assert "Cannot find any" in refused(engine, root / other, load_format=load_format)

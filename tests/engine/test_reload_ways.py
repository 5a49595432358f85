"""`--weight-reload`: where new weights wait, and what a failure on the way costs."""

import concurrent.futures
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxserve import Engine, memory_plan
from jaxserve.compile_counter import CompileCounter
from jaxserve.errors import RequestError
from jaxserve.models.safetensors_file import SafetensorsFile
from tests.engine.reloading import (
    ENDLESS,
    FILE,
    QUESTION,
    TOKENS,
    live_bytes,
    outputs,
    spans,
    write_variant,
)
from tests.server.serving import DEMO_MODEL, SMALL, programs_folder, wait_for

WEIGHTS_LOST = "Failed to update weights, and the old ones are overwritten"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    return str(write_variant(tmp_path_factory.mktemp("weights") / "other"))


@pytest.fixture(scope="module", params=["aside", "host", "in-place"])
def engine(request, pytestconfig):
    with Engine(
        model_path=DEMO_MODEL,
        compilation_cache_dir=programs_folder(pytestconfig),
        weights_root="/",
        weight_reload=request.param,
        **SMALL,
    ) as engine:
        yield engine
    jax.clear_caches()


@pytest.fixture
def way(engine) -> str:
    return engine._core._control.report()["weight_reload"]


@pytest.fixture(autouse=True)
def demo(engine):
    engine.update_weights_from_disk(DEMO_MODEL, weight_version="demo", in_flight="abort")
    wait_for(engine.flush_cache, 5)


def test_reloads_alternate_with_flat_memory_and_no_compile(engine, way, other):
    expected = {DEMO_MODEL: outputs(engine)}
    engine.update_weights_from_disk(other)
    expected[other] = outputs(engine)
    assert expected[other] != expected[DEMO_MODEL]
    wait_for(engine.flush_cache, 5)
    before, counter = live_bytes(), CompileCounter()
    for path in (DEMO_MODEL, other) * 5:
        engine.update_weights_from_disk(path)
        assert outputs(engine) == expected[path]
    counter.close()
    wait_for(engine.flush_cache, 5)
    print(f"{way}: {before} bytes before, {live_bytes()} after")
    assert live_bytes() == before
    assert not any(counter.report().values())


@pytest.mark.parametrize("in_flight", ["retract", "in_place"])
def test_request_in_flight_goes_on(engine, other, in_flight):
    running = engine.generate(QUESTION, TOKENS | {"max_new_tokens": 200}, stream=True)
    next(running)
    engine.update_weights_from_disk(other, weight_version="other", in_flight=in_flight)
    answer = list(running)[-1]
    assert [version for version, *_ in spans(answer)] == ["demo", "other"]
    assert len(answer["output_ids"]) == 200


def test_old_leaf_is_freed_before_its_successor_is_placed(engine, way, other, monkeypatch):
    runner, freed = engine._core._runner, []

    def overwrite(number, make, overwrite=runner.overwrite):
        before, size = device_bytes(), runner.weights[number].nbytes

        def make_and_look():
            freed.append(before - device_bytes() == size)
            return make()

        overwrite(number, make_and_look)

    monkeypatch.setattr(runner, "overwrite", overwrite)
    engine.update_weights_from_disk(other)
    assert freed == [True] * (0 if way == "aside" else len(runner.weights))


def device_bytes() -> int:
    arrays = jax.live_arrays()
    return sum(array.nbytes for array in arrays if array.sharding.memory_kind == "device")


def test_arrays_that_a_trainer_holds_outlive_their_service(engine, other):
    engine.update_weights_from_disk(other)
    held = engine._core.weights[0]
    values = np.array(held)
    engine.update_weights_from_disk(DEMO_MODEL)
    assert np.array_equal(np.asarray(held), values)


def test_missing_memory_is_told_with_the_flag(engine, way, other, monkeypatch):
    expected = outputs(engine)
    for name in ("free_memory", "free_host_memory"):
        monkeypatch.setattr(memory_plan, name, lambda *_: 1_000_000)
    if way == "in-place":  # needs none
        engine.update_weights_from_disk(other)
        return
    with pytest.raises(RequestError) as refused:
        engine.update_weights_from_disk(other)
    print(refused.value)
    size = sum(leaf.nbytes for leaf in engine._core._runner.weights) / 1e6
    assert f"--weight-reload {way} needs room" in str(refused.value)
    assert f"{size:.2f} MB, of which {size - 1:.2f} MB lack" in str(refused.value)
    assert f"start with --weight-reload {'host' if way == 'aside' else 'in-place'}" in str(
        refused.value
    )
    assert outputs(engine) == expected and engine.state.weight_version == "demo"


def test_device_that_runs_out_of_memory_says_so_too(engine, way, other, monkeypatch):
    if way != "aside":
        return

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    expected = outputs(engine)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "make_array_from_callback", fail)
        with pytest.raises(RequestError, match="--weight-reload aside needs room .*reload host"):
            engine.update_weights_from_disk(other)
    assert outputs(engine) == expected


def test_file_rewritten_while_an_update_waits(engine, way, other, tmp_path):
    """What is read already serves; what would have to be read again does not."""
    folder = tmp_path / "other"
    shutil.copytree(other, folder)
    expected = outputs(engine)
    endless = engine.generate(QUESTION, ENDLESS, stream=True)
    next(endless)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        update = pool.submit(engine.update_weights_from_disk, str(folder))
        task = wait_for(lambda: engine._core._control._update, 5).task
        wait_for(lambda: task.is_done, 10)
        with (folder / FILE).open("r+b") as file:
            file.seek(1_000_000)
            file.write(os.urandom(1000))
        endless.close()
        if way == "in-place":
            with pytest.raises(RequestError, match="was rewritten while it was read"):
                update.result(10)
            assert outputs(engine) == expected and engine.state.weight_version == "demo"
        else:
            update.result(10)
            engine.update_weights_from_disk(other)
            assert outputs(engine) != expected


def fail_at(monkeypatch, name: str, path: str) -> None:
    """The disk fails when this tensor is read a second time."""
    times = []

    def read_into(file, tensor, offset, out, read_into=SafetensorsFile.read_into):
        if tensor == name and file.path == pathlib.Path(path) / FILE:
            times.append(tensor)
            if len(times) > 1:
                raise OSError(5, "Input/output error", str(file.path))
        read_into(file, tensor, offset, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", read_into)


def test_disk_that_fails_over_the_old_weights(engine, way, other, monkeypatch):
    """What in-place risks: nothing is left to serve with, and everybody is told so."""
    expected = outputs(engine)
    running = engine.generate(QUESTION, ENDLESS, stream=True)
    next(running)
    with monkeypatch.context() as patched:
        fail_at(patched, "model.norm.weight", other)
        if way != "in-place":  # reads once only
            engine.update_weights_from_disk(other, in_flight="in_place")
            running.close()
            return
        with pytest.raises(RequestError) as lost:
            engine.update_weights_from_disk(other, in_flight="in_place")
    assert lost.value.status == 500 and str(lost.value).startswith(WEIGHTS_LOST)
    assert "Input/output error" in str(lost.value)
    reason = list(running)[-1]["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and reason["message"].startswith(WEIGHTS_LOST)
    with pytest.raises(RequestError, match="the weights are not complete") as refused:
        engine.generate(QUESTION, TOKENS)
    assert refused.value.status == 503 and engine.state.fault
    assert engine.state.weight_version == "demo", "the label of what was there"
    engine.update_weights_from_disk(DEMO_MODEL)
    assert engine.state.fault is None and outputs(engine) == expected

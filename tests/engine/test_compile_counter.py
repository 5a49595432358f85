"""The counter of compilations: it sees what JAX does, and tells before ready from after."""

import concurrent.futures
import itertools

import jax
import numpy as np
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.compile_counter import CompileCounter

NOTHING = {
    "compiled_at_start": 0,
    "compilation_cache_hits": 0,
    "compiled_after_ready": 0,
    "lowered_after_ready": 0,
    "traced_after_ready": 0,
}
CONSTANTS = itertools.count(2.5)
ONES = np.ones(3, np.float32)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """An empty cache of compiled programs, and the suite's own again afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for values in ((str(tmp_path_factory.mktemp("programs")), 0), before):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads the folder's name once
        if values is not before:
            yield


@pytest.fixture
def counter():
    counter = CompileCounter()
    yield counter
    counter.close()


def fresh_function():
    """One that neither JAX nor its cache has seen."""
    constant = next(CONSTANTS)
    return jax.jit(lambda x: x * constant)


def test_counts_before_and_after_ready_apart(counter):
    assert counter.report() == NOTHING
    known = fresh_function()
    known(ONES)
    counter.mark_ready()
    assert counter.report() == NOTHING | {"compiled_at_start": 1}
    known(ONES)
    assert counter.report()["traced_after_ready"] == 0
    fresh_function().lower(ONES)
    fresh_function()(ONES)
    jax.eval_shape(fresh_function(), ONES)
    report = counter.report()
    print(report)
    assert report == NOTHING | {
        "compiled_at_start": 1,
        "compiled_after_ready": 1,
        "lowered_after_ready": 2,
        "traced_after_ready": 3,
    }


def test_new_shape_of_a_known_function_is_counted(counter):
    known = fresh_function()
    known(ONES)
    counter.mark_ready()
    known(np.ones(4, np.float32))
    assert counter.report()["compiled_after_ready"] == 1


def test_ahead_of_time_compiled_program_is_counted_once(counter):
    program = fresh_function().lower(ONES).compile()
    counter.mark_ready()
    for _ in range(3):
        program(ONES)
    assert counter.report() == NOTHING | {"compiled_at_start": 1}


def test_eager_operation_is_counted(counter):
    counter.mark_ready()
    jax.numpy.flip(np.ones(12_345, np.float32))
    assert counter.report()["compiled_after_ready"] >= 1


def test_threads_lose_no_count(counter):
    functions = [fresh_function() for _ in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda function: function(ONES), functions))
    counter.mark_ready()
    assert counter.report()["compiled_at_start"] == 40


def test_program_from_the_persistent_cache_is_told():
    def compile_anew() -> dict[str, int]:
        jax.clear_caches()
        counter = CompileCounter()
        jax.jit(lambda x: x @ x.T + 0.5).lower(np.ones((60, 60), np.float32)).compile()
        counter.mark_ready()
        counter.close()
        return counter.report()

    first, second = compile_anew(), compile_anew()
    print(first, second)
    assert first == NOTHING | {"compiled_at_start": 1}
    assert second == NOTHING | {"compiled_at_start": 1, "compilation_cache_hits": 1}


def test_closed_counter_counts_no_more(counter):
    counter.close()
    counter.close()  # a second time is no error
    fresh_function()(ONES)
    counter.mark_ready()
    assert counter.report() == NOTHING


def test_each_counter_has_its_own_start(counter):
    fresh_function()(ONES)
    second = CompileCounter()
    fresh_function()(ONES)
    for one in (counter, second):
        one.mark_ready()
    second.close()
    assert counter.report()["compiled_at_start"] == 2
    assert second.report()["compiled_at_start"] == 1
    fresh_function()(ONES)
    assert counter.report()["compiled_after_ready"] == 1
    assert second.report()["compiled_after_ready"] == 0


def test_nothing_is_left_behind():
    before = monitoring_listeners()
    counter = CompileCounter()
    assert monitoring_listeners() == before + 2
    counter.close()
    assert monitoring_listeners() == before


def monitoring_listeners() -> int:
    from jax._src import monitoring as internal

    return len(internal.get_event_listeners()) + len(internal.get_event_duration_listeners())


def test_listeners_that_somebody_has_cleared_are_no_error(counter, monkeypatch):
    def missing(listener):
        raise AssertionError

    monkeypatch.setattr(monitoring, "unregister_event_listener", missing)
    monkeypatch.setattr(monitoring, "unregister_event_duration_listener", missing)
    counter.close()
    monkeypatch.undo()

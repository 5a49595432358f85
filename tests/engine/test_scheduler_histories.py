"""Any history of requests on the engine's real scheduler, cache, allocator and plans."""

from tests.engine.scheduler_machine import run_histories

MUST_HAPPEN = {
    "refused with 400",
    "refused with 503",
    "aborted waiting",
    "aborted running",
    "aborted gone",
    "flushed",
    "not flushed",
    "failed at before",
    "failed at after",
    "failed at read",
    "copied a partial page",
    "used the cache",
    "part of a prompt",
    "decoded beside a prompt",
    "several decode steps",
    "retracted",
    "late result",
    "reloaded in place with some running",
    "reloaded in place with none running",
    "reloaded retract with none running",
    "reload failed",
    "ended by length",
    "ended by stop",
    "ended by abort",
    "ended by abort 500",
}


def test_any_history():
    seen = run_histories(600)
    print(dict(sorted(seen.items())))
    assert all(seen[what] >= 5 for what in MUST_HAPPEN)

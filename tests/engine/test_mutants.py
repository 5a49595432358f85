"""Bugs that the histories of the scheduler must find."""

import inspect
import types
from itertools import batched

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from jaxserve import live_request as live_request_module
from jaxserve import scheduler as scheduler_module
from jaxserve.scheduler import Scheduler
from tests.engine.scheduler_machine import HISTORIES, SchedulerMachine

BUGS = {
    "result of an earlier stay in a row is taken": ("live.epoch += 1", "pass"),
    "no result is stale": ("return self.live.epoch != self.epoch", "return False"),
    "retraction drops the output": (
        "live.num_retractions += 1",
        "del live.tokens[len(live.request.prompt_ids) :]",
    ),
    "retraction forgets the tokens in flight": (
        "live.num_computed = live.num_inflight = live.prefill_len = 0",
        "live.num_computed = live.prefill_len = 0",
    ),
    "retracted goes to the back of the queue": (
        "self.waiting.insert(0, live)",
        "live.arrival = next(self._arrivals); self.waiting.append(live)",
    ),
    "the oldest is retracted": ("self._retract(max(", "self._retract(min("),
    "who arrived last goes first": (
        "self.waiting.sort(key=lambda live: live.order)",
        "self.waiting.sort(key=lambda live: live.order, reverse=True)",
    ),
    "pages leak when a row is left": ("self.allocator.free(live.pages[num_kept:])", "pass"),
    "pages are freed twice": (
        "self.allocator.free(live.pages[num_kept:])",
        "self.allocator.free(live.pages[max(num_kept - 1, 0) :])",
    ),
    "lock leaks": (
        "self.cache.unlock(live.node)\n        live.row",
        "pass\n        live.row",
    ),
    "match is not locked": ("self.cache.lock(match.node)", "match.node.lock_count += 0"),
    "partial page is not copied": ("if copy.num_tokens:", "if False:"),
    "whole prompt is matched": ("most=len(live.tokens) - 1", "most=len(live.tokens)"),
    "namespace is ignored by lookups": (
        "live.tokens, namespace=live.request.namespace, most",
        "live.tokens, most",
    ),
    "namespace is ignored by what is kept": (
        "live.pages[:num_kept],\n                namespace=live.request.namespace,",
        "live.pages[:num_kept],",
    ),
    "last sampled token counts as computed": ("len(self.tokens) - 1))", "len(self.tokens)))"),
    "tokens in flight count as known": (
        "return min(self.num_computed, max(self.prefill_len, len(self.tokens) - 1))",
        "return self.num_computed",
    ),
    "device is not told of new pages": ("changed_rows=changed", "changed_rows=[]"),
    "duplicate pages stay in use": ("live.pages[:num_full] = shared.pages", "pass"),
    "own pages count as shared": (
        "live.node, live.num_shared = shared.node, num_full",
        "live.node, live.num_shared = shared.node, len(live.pages)",
    ),
    "admitted without pages": (
        "fresh = self.allocator.allocate(missing)",
        "fresh = self.allocator.allocate(missing) or []",
        "<= self._num_available:",
        "< 10**9:",
    ),
    "pages for one decode step of several": ("min(self._num_decode_steps, live.num_left)", "1"),
    "more decode steps than tokens are left": (
        "count = min(num_steps, live.num_left)",
        "count = num_steps",
    ),
    "chunk beyond its budget": ("budget -= len(tokens)", "budget -= 1"),
    "failed step leaves the cache": (
        "self._retract(live, keep=False)\n        if self.cache is not None:",
        "self._retract(live, keep=False)\n        if False:",
    ),
    "flush beside a request": (
        "if self._by_rid:\n            return False",
        "if self.running:\n            return False",
    ),
}


def with_bug(*pieces: str) -> type[Scheduler]:
    """The scheduler, with pieces of its source replaced: old, new, old, new, ..."""
    sources = [inspect.getsource(module) for module in (live_request_module, scheduler_module)]
    for old, new in batched(pieces, 2):
        assert sum(source.count(old) for source in sources) == 1, "the source has changed"
        sources = [source.replace(old, new) for source in sources]
    lives, mutant = types.ModuleType("lives"), types.ModuleType("mutant")
    exec(sources[0], lives.__dict__)
    exec(sources[1], mutant.__dict__)
    for name in ("Chunk", "LiveRequest", "PageCopy", "Schedule"):
        setattr(mutant, name, getattr(lives, name))
    return mutant.Scheduler


def run_histories(scheduler: type[Scheduler], count: int) -> None:
    class Machine(SchedulerMachine):
        scheduler_type = scheduler

    run_state_machine_as_test(
        Machine,
        settings=settings(
            HISTORIES,
            max_examples=count,
            phases=[Phase.generate],
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
        ),
    )


def test_no_bug_is_found_where_there_is_none():
    run_histories(with_bug("budget -= len(tokens)", "budget -= len(tokens)"), 20)


@pytest.mark.parametrize("bug", BUGS)
def test_history_finds(bug):
    with pytest.raises(Exception) as found:
        run_histories(with_bug(*BUGS[bug]), 200)
    assert not isinstance(found.value, SyntaxError | NameError), "no bug, but no program"

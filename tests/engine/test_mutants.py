"""Bugs that must not pass: the engine with one of them, and the test that fails with it.

A property that no bug can break proves little. `NAMES` are the bugs that any engine of this kind
is prone to; the others are what this one could get wrong besides. Those of the radix cache alone
are in `test_radix_mutants.py`.
"""

from collections.abc import Callable

import pytest

from tests.engine import test_programs
from tests.engine.mutation import System, check_caught, mutate
from tests.engine.radix_model import run_shadow
from tests.engine.scheduler_machine import run_histories

NAMES = (
    "double free",
    "abort leak",
    "tail leak",
    "duplicate-page leak",
    "evict leak",
    "evict locked",
    "lock leak",
    "lock after alloc",
    "match on first token",
    "match whole prompt",
    "insert uncommitted",
    "no tenant key",
    "keep cache on reload",
    "abort by prefix",
    "drop output on retract",
    "retract to back",
    "admit impossible",
    "stale row's late result accepted",
    "page handed out before the launch that still reads it",
    "wrong row generation",
    "donor evicted before its page is copied",
    "slots beyond a partial match not zeroed",
)

Killer = Callable[[System], None]


def histories(system: System, most: int = 4000) -> None:
    """The most elusive mutants were caught after 725 with the worst of eight seeds, most of them
    after ten or twenty; `-rP` tells how many it took."""
    run_histories(most, system)


def shadow(system: System, most: int = 2000) -> None:
    run_shadow(system.radix_cache.RadixCache, most)


def on_device(test: Callable, *arguments) -> Killer:
    """A test of the compiled programs."""

    def kill(system: System) -> None:
        compile_all = system.compiler._compile_all
        system.compiler._compile_all = lambda jobs, *_: WhenWanted(jobs, compile_all)
        runner = test_programs.make_runner(system.compiler, system.runner.Runner)
        test(runner, *arguments)

    kill.__name__ = test.__name__
    return kill


class WhenWanted(dict):
    """Programs, each compiled when it is first wanted."""

    def __init__(self, jobs: dict[tuple, tuple], compile_all: Callable):
        self.jobs, self.compile_all = jobs, compile_all

    def __missing__(self, key: tuple):
        self.update(self.compile_all({key: self.jobs[key]}, None, lambda done, total: None))
        return self[key]


zeroes = on_device(
    test_programs.test_copy_keeps_the_first_tokens_and_zeroes_the_rest_in_all_layers, 2
)
copies_first = on_device(test_programs.test_donor_is_copied_before_its_next_owner_writes)
finished_rest = on_device(
    test_programs.test_row_that_finished_is_not_advanced_by_steps_dispatched_before_the_host_knew
)
padding_is_harmless = on_device(test_programs.test_padding_writes_to_the_trash_page_alone)

# By name: what fails with it, and the pieces of source that make it: old, new, old, new, ...
MUTANTS: dict[str, tuple] = {
    "double free": (
        histories,
        "self.allocator.free(live.pages[num_kept:])",
        "self.allocator.free(live.pages[max(num_kept - 1, 0) :])",
        " or self._is_free[page]",  # the allocator does not notice
        "",
    ),
    "abort leak": (
        histories,
        "if live.row >= 0:",
        "if live.row >= 0:\n            del live.pages[self._pages_for(live.num_committed) :]",
    ),
    "tail leak": (shadow, "duplicates.append(pages[-1])", "pass"),
    "duplicate-page leak": (shadow, "self.allocator.free(duplicates)", "pass"),
    "evict leak": (shadow, "self.allocator.free(dropped)", "pass"),
    "evict locked": (shadow, "del self._unlocked[node]\n", "pass\n"),
    "lock leak": (
        histories,
        "self.cache.unlock(live.node)\n        live.row",
        "pass\n        live.row",
    ),
    "lock after alloc": (
        histories,
        "self.cache.lock(match.node)",
        "pass",
        "if fresh is None:",
        "if self.cache: self.cache.lock(match.node)\n        if fresh is None:",
    ),
    "match on first token": (
        shadow,
        "node.keys[index : index + 1] != [key]:",
        "[k[:TOKEN_BYTES] for k in node.keys[index : index + 1]] != [key[:TOKEN_BYTES]]:",
        "same = _common_tokens(",
        "same = self.page_size or (",
    ),
    "match whole prompt": (histories, "most = len(self.tokens) - 1", "most = len(self.tokens)"),
    "insert uncommitted": (
        histories,
        "return min(self.num_computed, max(self.prefill_len, len(self.tokens) - 1))",
        "return self.num_computed",
    ),
    "no tenant key": (
        histories,
        "self._roots.get(namespace)",
        "next(iter(self._roots.values()), None)",
    ),
    "keep cache on reload": (histories, "self.cache.forget()", "pass"),
    "abort by prefix": (
        histories,
        "live = self._by_rid.get(rid)",
        "rid = next((one for one in self._by_rid if one.startswith(rid)), rid)\n"
        "        live = self._by_rid.get(rid)",
    ),
    "drop output on retract": (
        histories,
        "live.num_retractions += 1",
        "del live.tokens[len(live.request.prompt_ids) :]",
    ),
    "retract to back": (
        histories,
        "self.waiting.insert(0, live)",
        "live.arrival = next(self._arrivals); self.waiting.append(live)",
    ),
    "admit impossible": (histories, "> self.allocator.num_pages - 1:", "> 10**9:"),
    "stale row's late result accepted": (
        histories,
        "return self.live.epoch != self.epoch",
        "return False",
    ),
    # Somebody was faster with the same tokens: one's own pages are free, and the row reads on.
    "page handed out before the launch that still reads it": (
        histories,
        "if shared.pages != live.pages[:num_full]:",
        "if False:",
    ),
    "wrong row generation": (histories, "live.epoch += 1", "pass"),
    "donor evicted before its page is copied": (
        copies_first,
        "if plan.copies:",
        "if False:",
        "scores = self._score(plan)",
        "if plan.copies:\n"
        "            upload = ints(plan.copies).reshape(-1, 3)\n"
        '            self._run("copy_pages", len(upload), upload=upload)\n'
        "        scores = self._score(plan)",
    ),
    "slots beyond a partial match not zeroed": (
        zeroes,
        "pages[source], 0)",
        "pages[source], pages[target])",
    ),
    # What this engine could get wrong besides.
    "every result is stale": (histories, "Chunk(live, live.epoch, []", "Chunk(live, -1, []"),
    "retraction forgets the tokens in flight": (
        histories,
        "live.num_computed = live.num_inflight = live.prefill_len = 0",
        "live.num_computed = live.prefill_len = 0",
    ),
    "the oldest is retracted": (histories, "self._retract(max(", "self._retract(min("),
    "who arrived last goes first": (
        histories,
        "self.waiting.sort(key=lambda live: live.order)",
        "self.waiting.sort(key=lambda live: live.order, reverse=True)",
    ),
    "lpm forgets the priority": (histories, "(-live.request.priority, -matched", "(0, -matched"),
    "pages leak when a row is left": (
        histories,
        "self.allocator.free(live.pages[num_kept:])",
        "pass",
    ),
    "pages are freed twice": (
        histories,
        "self.allocator.free(live.pages[num_kept:])",
        "self.allocator.free(live.pages[max(num_kept - 1, 0) :])",
    ),
    "an allocation takes what there is": (
        histories,
        "if count > len(self._free):\n            return None",
        "if count > len(self._free):\n            return self._free.clear()",
    ),
    "a failed admission keeps its lock": (
        histories,
        "self.cache.unlock(match.node)",
        "pass",
    ),
    "match is not locked": (histories, "self.cache.lock(match.node)", "match.node.lock_count += 0"),
    "partial page is not copied": (histories, "if copy.num_tokens:", "if False:"),
    # Its row is admitted, but the budget of prompt tokens is spent: its first chunk comes later.
    "a copy waits for its row's first chunk": (
        histories,
        "copies=copies,",
        "copies=self._take_copies(copies, prefill),",
        "    # Decoding.\n",
        "    _late = ()\n\n"
        "    def _take_copies(self, copies, prefill):\n"
        "        pages = {page for chunk in prefill for page in chunk.live.pages}\n"
        "        copies = [*self._late, *copies]\n"
        "        self._late = [copy for copy in copies if copy.target not in pages]\n"
        "        return [copy for copy in copies if copy.target in pages]\n\n",
    ),
    "namespace is ignored by lookups": (
        histories,
        "live.tokens, namespace=live.request.namespace, most",
        "live.tokens, most",
    ),
    "namespace is ignored by what is kept": (
        histories,
        "live.pages[:num_kept],\n                namespace=live.request.namespace,",
        "live.pages[:num_kept],",
    ),
    "last sampled token counts as computed": (
        histories,
        "len(self.tokens) - 1))",
        "len(self.tokens)))",
    ),
    "device is not told of new pages": (histories, "changed_rows=changed", "changed_rows=[]"),
    "duplicate pages stay in use": (
        histories,
        "live.pages[:num_full] = shared.pages",
        "pass",
    ),
    "own pages count as shared": (
        histories,
        "live.node, live.num_shared = shared.node, num_full",
        "live.node, live.num_shared = shared.node, len(live.pages)",
    ),
    "admitted without pages": (
        histories,
        "fresh = self.allocator.allocate(missing)",
        "fresh = self.allocator.allocate(missing) or []",
        "<= self._num_available:",
        "< 10**9:",
    ),
    "pages for one decode step of several": (
        histories,
        "min(self._num_decode_steps, live.num_left)",
        "1",
    ),
    "more decode steps than tokens are left": (
        histories,
        "count = min(num_steps, live.num_left)",
        "count = num_steps",
    ),
    "chunk beyond its budget": (histories, "budget -= len(tokens)", "budget -= 1"),
    "flush beside a request": (
        histories,
        "if self._by_rid:\n            return False",
        "if self.running:\n            return False",
    ),
    "full queue takes one more": (
        histories,
        "num_waiting >= self._max_waiting",
        "num_waiting > self._max_waiting",
    ),
    "id that is taken is taken again": (histories, "if request.rid in self._by_rid:", "if False:"),
    "the device decodes an old batch": (
        histories,
        "is_new_batch, self._batch = rows != self._batch, rows",
        "is_new_batch, self._batch = len(rows) != len(self._batch), rows",
    ),
    "a failed step leaves the cache": (
        histories,
        "if self.cache is not None and not keep:",
        "if False:",
    ),
    "a reload forgets who runs": (histories, "live.is_mixed = live.num_computed > 0", "pass"),
    "what different weights have computed is shared": (
        histories,
        "if self.cache is None or live.is_mixed:",
        "if self.cache is None:",
    ),
    "what different weights have computed is kept": (
        histories,
        "self.cache is not None and not live.is_mixed:",
        "self.cache is not None:",
    ),
    "a failed step's state is used again": (
        histories,
        "self._is_state_lost = True",
        "self._is_state_lost = False",
    ),
    "a recovery keeps steps in flight": (
        histories,
        "self._inflight.clear()\n        self.scheduler.retract",
        "self.scheduler.retract",
    ),
    "the device decodes one token too many": (
        histories,
        "line[4] = len(request.prompt_ids) + request.max_new_tokens - 1",
        "line[4] = len(request.prompt_ids) + request.max_new_tokens",
    ),
    "logprobs of a prompt are told again": (
        histories,
        "live.num_scored = chunk.first_score + chunk.num_scores",
        "pass",
    ),
    "logprobs of a prompt are of other tokens": (
        histories,
        "before = offset - chunk.start - 1",
        "before = offset - 1",
    ),
    "who waits for another's prompt is lost": (
        histories,
        "self.waiting[:0] = passed_over",
        "pass",
    ),
    "experts are told again": (
        histories,
        "known = max(live.num_routed - chunk.start, 0)",
        "known = 0",
    ),
    "experts of cached tokens are left out": (
        histories,
        "most = min(most, self.num_routed)",
        "pass",
    ),
    "experts are those of another request": (
        histories,
        "num_packed, num_packed + chunk.num_packed",
        "num_packed, num_packed + len(chunk.tokens)",
    ),
    "a new row is not told to run": (
        histories,
        "live.num_matched, KEEP, RUNNING",
        "live.num_matched, KEEP, KEEP",
    ),
    "finished row is extended": (
        finished_rest,
        "is_running = state.finish[rows] == RUNNING\n\n",
        "is_running = state.finish[rows] >= RUNNING\n\n",
    ),
    "finished row goes on decoding": (
        finished_rest,
        "is_running = state.finish[rows] == RUNNING\n        ",
        "is_running = state.finish[rows] >= RUNNING\n        ",
    ),
    "padding writes to a row's page": (
        padding_is_harmless,
        "slots = jnp.where(is_live, slots, 0)",
        "slots = slots + 0",
    ),
}


def test_every_named_mutant_is_here():
    assert len(set(NAMES)) == 22 and set(NAMES) <= set(MUTANTS)


def test_no_bug_is_found_where_there_is_none():
    histories(mutate(), 100)
    shadow(mutate(), 50)
    for killer in (zeroes, copies_first, finished_rest, padding_is_harmless):
        killer(mutate())


@pytest.mark.parametrize("name", MUTANTS)
def test_is_caught(name: str):
    killer, *edits = MUTANTS[name]
    check_caught(name, tuple(edits), killer)

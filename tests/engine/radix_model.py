"""Random requests on a RadixCache, and a shadow that knows what was written into each page.

The shadow follows the requests, not the tree: the tokens written into each page, the locks, the
times of use. From those it says what a match must find, what may be evicted and in which order.
Of the tree it takes only which pages it owns. What holds after every call: each page has one owner;
locks are counted exactly and protect whole paths; every cached slot holds what its path says; the
pages that requests read are still what they matched; nothing is cached twice.
"""

import dataclasses
import sys
from array import array
from collections.abc import Hashable
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.page_allocator import PageAllocator
from jaxserve.radix_cache import TOKEN_BYTES, Match, Node, RadixCache

LETTERS = 1, 257  # their first bytes agree: a match counts tokens, not bytes
NAMESPACES = "", "", "", ("adapter", 1)  # one of them draws most: more prompts meet
MAX_RUNNING = 4
PROMPTS = st.integers(0, 4 * 36 * 72 * 72 - 1)  # one draw each: drawing takes most of the time


@dataclasses.dataclass(eq=False)
class Lock:
    node: Node
    pages: set[int]  # that it must keep


@dataclasses.dataclass(eq=False)
class Running:
    """A request: as the scheduler will hold it."""

    tokens: tuple[int, ...]
    namespace: Hashable
    pages: list[int]
    lock: Lock
    copy: tuple[Lock, Match] | None  # a donor's page, not copied yet
    num_written: int  # tokens whose keys and values are in the pages
    is_old: bool = False  # some of them were written before all was forgotten


class RadixMachine(RuleBasedStateMachine):
    cache_type = RadixCache
    num_examples = 0

    @initialize(page_size=st.sampled_from((1, 2, 4, 16)), num_pages=st.integers(4, 12))
    def start(self, page_size: int, num_pages: int):
        type(self).num_examples += 1
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages + 1)
        self.cache = self.cache_type(page_size, self.allocator)
        self.running: list[Running] = []
        self.locks: list[Lock] = []
        self.written: dict[tuple[int, int], tuple] = {}  # page, slot -> namespace, tokens so far
        self.old: set[int] = set()  # pages that were forgotten while they were locked
        self.used: dict[int, int] = {}  # page -> when
        self.now = 0

    # What happens

    @precondition(lambda self: len(self.running) < MAX_RUNNING)
    @rule(number=PROMPTS)
    def submit(self, number: int):
        self.start_request(*self.prompt(number))

    def start_request(self, tokens: tuple[int, ...], namespace: Hashable) -> bool:
        match = self.match(tokens, namespace, len(tokens) - 1)
        assert match.num_tokens < len(tokens), "a prefill computes a token"
        lock = self.lock(match.node, match.pages)
        copy = None
        if match.donor is not None:
            copy = self.lock(match.donor, match.pages + match.donor.pages), match
        fresh = self.allocate(-(-len(tokens) // self.page_size) - len(match.pages))
        request = Running(tokens, namespace, match.pages, lock, copy, match.num_tokens)
        self.running.append(request)
        if fresh is None:
            self.abort(-1)
            return False
        request.pages = match.pages + fresh
        return True

    @rule(number=PROMPTS)
    def serve(self, number: int):
        """A request from its start to its end."""
        self.serve_request(*self.prompt(number))

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, MAX_RUNNING))
    def overtake(self, index: int):
        """While a request runs another comes that is like it, and ends."""
        request = self.running[index % len(self.running)]
        self.serve_request(request.tokens, request.namespace)

    def serve_request(self, tokens: tuple[int, ...], namespace: Hashable):
        if self.start_request(tokens, namespace):
            self.step(-1, len(tokens))
            self.finish(-1)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, MAX_RUNNING), count=st.integers(1, 50))
    def step(self, index: int, count: int):
        """The donor's page is copied, then tokens are computed."""
        request = self.running[index % len(self.running)]
        if request.copy is not None:
            lock, match = request.copy
            target = request.pages[len(match.pages)]
            for slot in range(match.donor_tokens):
                self.written[target, slot] = self.written[match.donor_page, slot]
            self.unlock(lock)
            request.copy = None
        stop = min(request.num_written + count, len(request.tokens))
        for position in range(request.num_written, stop):
            page, slot = request.pages[position // self.page_size], position % self.page_size
            assert page not in self.cached_pages(), "cached pages are never written"
            self.written[page, slot] = request.namespace, request.tokens[: position + 1]
        request.num_written = stop

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, MAX_RUNNING), count=st.integers(1, 50))
    def step_and_insert(self, index: int, count: int):
        """A chunk of prefill that other requests may use before this one ends."""
        self.step(index, count)
        request = self.running[index % len(self.running)]
        if request.is_old:
            return
        match = self.insert(request, is_running=True)
        assert match.num_tokens == len(match.pages) * self.page_size
        before = request.lock
        request.pages[: len(match.pages)] = match.pages
        request.lock = self.lock(match.node, match.pages)
        self.unlock(before)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, MAX_RUNNING))
    def finish(self, index: int):
        if self.running[index % len(self.running)].is_old:
            self.abort(index)
            return
        request = self.running.pop(index % len(self.running))
        self.give_up_copy(request)
        stop = -(-request.num_written // self.page_size)
        if request.num_written % self.page_size:  # an overlapped step wrote one token too many
            self.written[request.pages[stop - 1], request.num_written % self.page_size] = ("", ())
        self.insert(request, is_running=False)
        self.allocator.free(request.pages[stop:])
        self.unlock(request.lock)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, MAX_RUNNING))
    def abort(self, index: int):
        request = self.running.pop(index % len(self.running))
        self.give_up_copy(request)
        self.allocator.free(request.pages[len(request.lock.pages) :])
        self.unlock(request.lock)

    @rule(number=PROMPTS, most=st.none() | st.integers(-1, 40))
    def look_up(self, number: int, most: int | None):
        self.match(*self.prompt(number), most)

    @precondition(lambda self: self.cache.total_pages)
    @rule(num_pages=st.integers(0, 3))
    def evict(self, num_pages: int):
        before, num_free = self.cached_pages(), self.allocator.num_free
        nodes = [(list(n.pages), max(self.used[p] for p in n.pages), n) for n in self.cache.nodes()]
        leaves = [(p, t) for p, t, n in nodes if not n.children and not self.count_locks(p[0])]
        freed = self.cache.evict(num_pages)
        assert freed == min(num_pages, len(before - self.locked_pages()))
        assert freed == self.allocator.num_free - num_free
        gone = before - self.cached_pages()
        newest_gone = max((time for pages, time, _ in nodes if gone & set(pages)), default=0)
        assert all(newest_gone <= time for pages, time in leaves if not gone & set(pages))
        for _, _, node in nodes:
            if gone.issuperset(node.pages):
                with pytest.raises(ValueError):
                    self.cache.lock(node)

    @precondition(lambda self: self.now % 8 == 7)  # seldom: it ends what else could be seen
    @rule()
    def forget(self):
        self.cache.forget()
        assert self.cached_pages() == self.locked_pages(), "what nobody uses is free at once"
        self.old = self.cached_pages()
        for request in self.running:
            request.is_old = True

    @precondition(lambda self: self.locked_pages() or self.now > 40)
    @rule()
    def reset(self):
        """And before it what is refused, and changes nothing."""
        for node in self.cache.nodes():
            with pytest.raises(ValueError):
                self.cache.insert([0] * self.page_size, node.pages[:1])
            with pytest.raises(ValueError):
                self.cache.insert([0] * self.page_size, [])
            if not self.count_locks(node.pages[0]):
                with pytest.raises(ValueError):
                    self.cache.unlock(node)
        if not self.locked_pages():
            self.cache.reset()
            assert not self.cached_pages()
            return
        before = self.cached_pages()
        with pytest.raises(ValueError):
            self.cache.reset()
        assert self.cached_pages() == before

    def teardown(self):
        if sys.exception() is None and hasattr(self, "cache"):
            while self.running:
                self.abort(0)
            self.cache.reset()
            assert self.allocator.num_used == 0

    # What must hold

    @invariant()
    def is_whole(self):
        self.cache.check_integrity()
        self.allocator.check_integrity()

    @invariant()
    def each_page_has_one_owner(self):
        cached = [page for node in self.cache.nodes() for page in node.pages]
        own = [page for r in self.running for page in r.pages[len(r.lock.pages) :]]
        used = cached + own
        assert len(set(used)) == len(used) == self.allocator.num_used
        assert not any(self.allocator._is_free[page] for page in used)

    @invariant()
    def locks_count(self):
        for node in self.cache.nodes():
            assert {self.count_locks(page) for page in node.pages} == {node.lock_count}
            assert node.parent.lock_count >= node.lock_count
        cached, locked = self.cached_pages(), self.locked_pages()
        assert locked <= cached
        assert self.old & cached <= locked, "what is forgotten goes with its last lock"
        assert self.cache.total_pages == len(cached)
        assert self.cache.protected_pages == len(locked)
        assert self.cache.evictable_pages == len(cached - locked)

    @invariant()
    def pages_hold_what_the_tree_says(self):
        for node in self.cache.nodes():
            path, namespace = tokens_of(node)
            start = len(path) - len(node.tokens) // TOKEN_BYTES
            for position in range(start, len(path)):
                page = node.pages[(position - start) // self.page_size]
                expected = namespace, path[: position + 1]
                assert self.written[page, position % self.page_size] == expected

    @invariant()
    def pages_hold_what_requests_need(self):
        for request in self.running:
            num_tokens = request.num_written
            if request.copy is not None:
                _, match = request.copy
                num_tokens = len(match.pages) * self.page_size
                self.check_content(request, [match.donor_page], num_tokens, match.num_tokens)
            self.check_content(request, request.pages, 0, num_tokens)

    @invariant()
    def tree_is_page_aligned(self):
        for node in self.cache.nodes():
            num_tokens = len(node.tokens) // TOKEN_BYTES
            is_tail = 0 < num_tokens < self.page_size and len(node.pages) == 1
            assert num_tokens == len(node.pages) * self.page_size > 0 or is_tail
            assert not (is_tail and node.children)
            first = [child.tokens[: TOKEN_BYTES * self.page_size] for child in node.children]
            assert all(a < b for a, b in pairwise(first))

    @invariant()
    def nothing_is_cached_twice(self):
        """Nor as a tail of what another page holds, but while it is locked."""
        prefixes = self.prefixes()
        for page, (namespace, tokens) in prefixes.items():
            start = (len(tokens) - 1) // self.page_size
            for other, (other_namespace, longer) in prefixes.items():
                if page == other or namespace != other_namespace or self.count_locks(page):
                    continue
                is_same_place = start == (len(longer) - 1) // self.page_size
                assert not (is_same_place and longer[: len(tokens)] == tokens)

    # The shadow

    def prompt(self, number: int) -> tuple[tuple[int, ...], Hashable]:
        """A namespace and up to two pages and a bit of one letter, but for two tokens at most."""
        longest = 2 * self.page_size + 4
        number, namespace = divmod(number, len(NAMESPACES))
        number, length = divmod(number, longest)
        others = number % (2 * longest), number // (2 * longest) % (2 * longest)  # half are past it
        letters = (LETTERS[i in others] for i in range(length + 1))
        return tuple(letters), NAMESPACES[namespace]

    def cached_pages(self) -> set[int]:
        return {page for node in self.cache.nodes() for page in node.pages}

    def locked_pages(self) -> set[int]:
        return set().union(*(lock.pages for lock in self.locks))

    def count_locks(self, page: int) -> int:
        return sum(page in lock.pages for lock in self.locks)

    def prefixes(self) -> dict[int, tuple]:
        """For each page that can be matched its namespace and the tokens up to its last one."""
        cached = self.cached_pages() - self.old
        prefixes = {}
        for (page, _), (namespace, tokens) in self.written.items():
            if page in cached and len(tokens) > len(prefixes.get(page, ("", ()))[1]):
                prefixes[page] = namespace, tokens
        return prefixes

    def longest(self, tokens: tuple[int, ...], namespace: Hashable) -> int:
        """How much of the sequence is cached, by comparing it with everything."""
        return max(
            (common(tokens, cached) for ns, cached in self.prefixes().values() if ns == namespace),
            default=0,
        )

    def match(self, tokens: tuple[int, ...], namespace: Hashable, most: int | None) -> Match:
        match = self.cache.match_prefix(tokens, namespace=namespace, most=most)
        limit = len(tokens) if most is None else max(most, 0)
        assert match.num_tokens == self.longest(tokens[:limit], namespace)
        assert divmod(match.num_tokens, self.page_size) == (len(match.pages), match.donor_tokens)
        assert (match.donor is None) == (match.donor_tokens == 0)
        request = Running(tokens, namespace, match.pages, Lock(match.node, set()), None, 0)
        start = len(match.pages) * self.page_size
        self.check_content(request, match.pages, 0, start)
        self.check_content(request, [match.donor_page], start, match.num_tokens)
        self.touch(match.pages + (match.donor.pages if match.donor is not None else []))
        return match

    def check_content(self, request: Running, pages: list[int], start: int, stop: int):
        """The pages, the first of which begins at `start`, hold these tokens of the request."""
        for position in range(start, stop):
            page = pages[(position - start) // self.page_size]
            expected = request.namespace, request.tokens[: position + 1]
            assert self.written[page, position % self.page_size] == expected

    def insert(self, request: Running, *, is_running: bool) -> Match:
        tokens = request.tokens[: request.num_written]
        num_full = len(tokens) // self.page_size
        pages = request.pages[: -(-len(tokens) // self.page_size)]
        cached = {prefix: page for page, prefix in self.prefixes().items()}
        expected = [
            cached.get((request.namespace, tokens[: (i + 1) * self.page_size]), page)
            for i, page in enumerate(pages[:num_full])
        ]
        match = self.cache.insert(tokens, pages, namespace=request.namespace, is_running=is_running)
        assert match.pages == expected and match.donor is None
        kept = tokens[: num_full * self.page_size] if is_running else tokens
        assert self.longest(kept, request.namespace) == len(kept)
        self.touch(match.pages)
        if len(kept) > match.num_tokens:  # which of several siblings is used is the cache's choice
            begins_so = [n for n in match.node.children if tokens_of(n)[0][: len(kept)] == kept]
            self.touch(match.pages + begins_so[0].pages)
        return match

    def touch(self, pages):
        self.now += 1
        self.used.update(dict.fromkeys(pages, self.now))

    def lock(self, node: Node, pages: list[int]) -> Lock:
        self.cache.lock(node)
        self.locks.append(Lock(node, set(pages)))
        return self.locks[-1]

    def unlock(self, lock: Lock):
        self.cache.unlock(lock.node)
        self.locks.remove(lock)
        self.touch(lock.pages - self.locked_pages())

    def give_up_copy(self, request: Running):
        if request.copy is not None:
            lock, match = request.copy
            self.unlock(lock)
            request.copy, request.num_written = None, len(match.pages) * self.page_size

    def allocate(self, count: int) -> list[int] | None:
        missing = count - self.allocator.num_free
        if missing > self.cache.evictable_pages:
            return None
        self.evict(max(missing, 0))
        pages = self.allocator.allocate(count)
        self.old -= set(pages)
        self.written = {key: value for key, value in self.written.items() if key[0] not in pages}
        return pages


def tokens_of(node: Node) -> tuple[tuple[int, ...], Hashable]:
    """All tokens from the root on, and the namespace."""
    packed = b""
    while node.parent is not None:
        packed = node.tokens + packed
        node = node.parent
    return tuple(array("i", packed)), node.namespace


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)


def run_shadow(cache_type: type[RadixCache], most: int) -> None:
    """So many examples, or until one fails; the same in every run."""
    machine = type("Machine", (RadixMachine,), {"cache_type": cache_type, "num_examples": 0})
    try:
        run_state_machine_as_test(machine, settings=settings(UNTIL_CAUGHT, max_examples=most))
    finally:
        print(f"{machine.num_examples} examples")


UNTIL_CAUGHT = settings(
    stateful_step_count=40,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

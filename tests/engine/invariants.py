"""What must hold of pages, locks and slots between any two calls, worked out anew each time:
nothing here asks the scheduler, the cache or the allocator for sums that they keep."""

import collections
from collections.abc import Callable

from jaxserve.live_request import LiveRequest
from jaxserve.radix_cache import TOKEN_BYTES, Node
from jaxserve.scheduler import Scheduler
from tests.engine.fake_device import Device, chain_of


def pages_have_one_owner(scheduler: Scheduler) -> None:
    """The free list, the tree or a request; page 0 has none, and no page is lost."""
    free, num_pages = scheduler.allocator._free, scheduler.allocator.num_pages
    cached = [page for node in nodes_of(scheduler) for page in node.pages]
    owned = sorted([*free, *cached, *private_pages(scheduler)])
    assert owned == list(range(1, num_pages)), "each page has one owner, and none is lost"


def locks_are_exact(scheduler: Scheduler) -> None:
    """A node is locked once by every request that runs on it or below it. Such a node is in the
    tree, and the pages down to it are those that the request shares."""
    nodes, counts = nodes_of(scheduler), collections.Counter()
    for live in scheduler.running:
        path = path_of(live.node)
        assert all(any(node is other for other in nodes) for node in path), "locked, and evicted"
        assert [page for node in path for page in node.pages] == live.pages[: live.num_shared]
        counts.update(map(id, path))
    for node in nodes:
        assert node.lock_count == counts[id(node)], "locked by who uses it, and no other"


def requests_fit_their_pages(scheduler: Scheduler, page_size: int) -> None:
    for live in scheduler.running:
        assert len(set(live.pages)) == len(live.pages)
        assert live.num_committed <= min(len(live.tokens), page_size * len(live.pages))


def pages_hold_what_requests_need(
    scheduler: Scheduler, device: Device, chain: Callable[[LiveRequest], list[int]]
) -> None:
    """`chain` says what that is, of the tokens that are known and computed."""
    for live in scheduler.running:
        check_slots(device, chain(live), live.pages)


def pages_hold_what_the_tree_says(scheduler: Scheduler, device: Device) -> None:
    """But for what weights of before have computed, which is there for those who still use it."""
    for node in nodes_of(scheduler):
        path = path_of(node)
        root = path[0].parent
        if root in scheduler.cache._old_roots:
            assert node.lock_count, "nobody needs it"
            continue
        packed = b"".join(one.tokens for one in path)
        tokens = memoryview(packed).cast("i").tolist()
        assert len(packed) == TOKEN_BYTES * len(tokens)
        pages = [page for one in path for page in one.pages]
        check_slots(device, chain_of(tokens, root.namespace, device.version), pages)


def check_slots(device: Device, chain: list[int], pages: list[int]) -> None:
    for position, expected in enumerate(chain):
        slot = pages[position // device.page_size], position % device.page_size
        assert device.slots.get(slot) == (position, expected), "not what it is kept for"


def nodes_of(scheduler: Scheduler) -> list[Node]:
    return [] if scheduler.cache is None else list(scheduler.cache.nodes())


def path_of(node: Node | None) -> list[Node]:
    """From below the root down to the node."""
    path = []
    while node is not None and node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def private_pages(scheduler: Scheduler) -> list[int]:
    return [page for live in scheduler.running for page in own_pages(live)]


def own_pages(live: LiveRequest) -> list[int]:
    return live.pages[live.num_shared :]

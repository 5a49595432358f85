"""What the radix cache promises, a shadow that must agree with it, and bugs that must not pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.page_allocator import PageAllocator
from jaxserve.radix_cache import RadixCache
from tests.engine.radix_model import RadixMachine


def make_cache(page_size: int = 4, num_pages: int = 64) -> RadixCache:
    return RadixCache(page_size, PageAllocator(num_pages + 1))


@pytest.fixture
def cache() -> RadixCache:
    return make_cache()


def insert(cache: RadixCache, tokens, **options) -> list[int]:
    """The pages that the tokens were computed in."""
    pages = cache.allocator.allocate(-(-len(tokens) // cache.page_size))
    cache.insert(tokens, pages, **options)
    cache.check_integrity()
    return pages


def num_cached(cache: RadixCache, tokens, **options) -> int:
    return cache.match_prefix(tokens, **options).num_tokens


# Matching


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_matches_to_the_token_on_any_page_size(page_size: int):
    cache, tokens = make_cache(page_size), list(range(37))
    insert(cache, tokens)
    for length in range(38):
        assert num_cached(cache, tokens[:length] + [99] * 9) == length
    assert num_cached(cache, tokens, most=36) == 36
    cache.check_integrity()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from((1, 257)), min_size=1, max_size=40), max_size=20))
def test_page_sizes_agree(prompts: list[list[int]]):
    caches = [make_cache(page_size, 1000) for page_size in (1, 2, 4, 16)]
    for tokens in prompts:
        assert len({num_cached(cache, tokens, most=len(tokens) - 1) for cache in caches}) == 1
        for cache in caches:
            insert(cache, tokens)


def test_match_gives_full_pages_and_a_donor(cache: RadixCache):
    pages = insert(cache, range(10))
    match = cache.match_prefix([*range(9), 99])
    assert match.pages == pages[:2] and match.num_tokens == 9
    assert (match.donor_page, match.donor_tokens) == (pages[2], 1)
    assert match.donor.parent is match.node


def test_donor_is_the_child_with_the_longest_common_prefix(cache: RadixCache):
    for tokens in ([1, 1, 1, 1], [1, 2, 1, 1], [1, 2, 3, 1], [1, 3, 1, 1], [2]):
        insert(cache, tokens)
    assert num_cached(cache, [1, 2, 3, 9, 9]) == 3
    assert num_cached(cache, [1, 2, 0, 0, 0]) == 2
    assert num_cached(cache, [2, 2, 2, 2, 2]) == 1
    assert num_cached(cache, [3, 2, 3, 1]) == 0


def test_most_limits_the_match(cache: RadixCache):
    insert(cache, range(8))
    assert num_cached(cache, range(8), most=7) == 7
    assert num_cached(cache, range(8), most=4) == 4
    assert num_cached(cache, range(8), most=-1) == 0
    assert num_cached(cache, []) == 0


def test_tokens_are_compared_not_hashed(cache: RadixCache):
    assert hash((-1, 5, 5, 5)) == hash((-2, 5, 5, 5))
    insert(cache, [-1, 5, 5, 5])
    assert num_cached(cache, [-2, 5, 5, 5]) == 0


def test_namespaces_share_nothing(cache: RadixCache):
    insert(cache, range(8), namespace=("salt", 1))
    assert num_cached(cache, range(8), namespace=("salt", 1)) == 8
    assert num_cached(cache, range(8), namespace=("salt", 2)) == 0
    assert num_cached(cache, range(8)) == 0


# Inserting


def test_pages_that_duplicate_cached_ones_are_freed(cache: RadixCache):
    first = cache.allocator.allocate(2)
    cache.insert(range(8), first)
    second = cache.allocator.allocate(3)
    match = cache.insert(range(12), second)
    assert match.pages == [*first, second[2]]
    assert cache.allocator.num_used == cache.total_pages == 3


def test_pages_that_are_shared_stay(cache: RadixCache):
    insert(cache, range(8))
    shared = cache.match_prefix(range(8)).pages
    own = cache.allocator.allocate(1)
    assert cache.insert(range(12), shared + own).pages == shared + own
    assert cache.allocator.num_used == 3


def test_running_request_keeps_its_partial_page(cache: RadixCache):
    pages = cache.allocator.allocate(3)
    match = cache.insert(range(10), pages, is_running=True)
    assert match.pages == pages[:2] and match.num_tokens == 8
    assert num_cached(cache, range(10)) == 8
    cache.allocator.free(pages[2:])


def test_longer_sequence_replaces_a_tail(cache: RadixCache):
    insert(cache, range(6))
    insert(cache, range(7))
    assert cache.total_pages == 2 and num_cached(cache, range(9)) == 7
    insert(cache, range(13))
    assert cache.total_pages == 4 and num_cached(cache, range(13)) == 13
    assert cache.allocator.num_used == 4


def test_tail_that_is_cached_already_is_freed(cache: RadixCache):
    insert(cache, range(8))
    insert(cache, range(6))
    assert cache.allocator.num_used == cache.total_pages == 2


def test_tails_of_a_conversation_do_not_accumulate(cache: RadixCache):
    for length in range(1, 100):
        insert(cache, range(length))
    assert cache.allocator.num_used == cache.total_pages == 25


def test_locked_tail_goes_when_it_is_unlocked(cache: RadixCache):
    (page,) = insert(cache, range(2))
    match = cache.match_prefix(range(3))
    cache.lock(match.donor)
    insert(cache, range(4))
    assert cache.match_prefix(range(3)).donor_page != page and cache.total_pages == 2
    cache.unlock(match.donor)
    assert cache.allocator.num_used == cache.total_pages == 1


@pytest.mark.parametrize("tokens, num_pages", [(range(8), 1), (range(9), 2), (range(4), 2)])
def test_pages_must_fit_the_tokens(cache: RadixCache, tokens, num_pages: int):
    with pytest.raises(ValueError, match="tokens do not fill"):
        cache.insert(tokens, cache.allocator.allocate(num_pages))
    assert cache.total_pages == 0


def test_a_page_has_one_owner(cache: RadixCache):
    pages = insert(cache, range(8))
    for claimed in ([pages[0], 9], [pages[1], pages[0]], [9, 9]):
        with pytest.raises(ValueError, match="two owners"):
            cache.insert(range(50, 58), claimed)
    assert num_cached(cache, range(8)) == 8 and cache.total_pages == 2


# Locking and evicting


def test_evicts_least_recently_used_leaf(cache: RadixCache):
    for token in (1, 2, 3):
        insert(cache, [token] * 4)
    num_cached(cache, [1] * 4)
    assert cache.evict(1) == 1
    assert [num_cached(cache, [token] * 4) for token in (1, 2, 3)] == [4, 0, 4]


def test_being_a_donor_is_a_use(cache: RadixCache):
    insert(cache, [1] * 4)
    insert(cache, [2] * 4)
    num_cached(cache, [1, 1, 9])
    cache.evict(1)
    assert num_cached(cache, [1] * 4) == 4


def test_unlocking_is_a_use(cache: RadixCache):
    insert(cache, [1] * 4)
    node = cache.match_prefix([1] * 4).node
    cache.lock(node)
    insert(cache, [2] * 4)
    cache.unlock(node)
    cache.evict(1)
    assert num_cached(cache, [1] * 4) == 4


def test_evicts_no_more_than_asked_from_the_end_of_a_leaf(cache: RadixCache):
    insert(cache, range(40))
    assert cache.evict(3) == 3
    assert num_cached(cache, range(40)) == 28
    cache.check_integrity()


def test_evicts_children_before_parents(cache: RadixCache):
    insert(cache, range(8))
    insert(cache, [*range(8), 1, 1, 1, 1])
    insert(cache, [*range(8), 2, 2, 2, 2])
    cache.evict(2)
    assert num_cached(cache, range(8)) == 8 and cache.total_pages == 2
    assert cache.evict(9) == 2 and cache.allocator.num_used == 0


def test_locks_keep_a_node_and_its_ancestors(cache: RadixCache):
    insert(cache, range(8))
    insert(cache, range(16))
    insert(cache, range(20))
    node = cache.match_prefix(range(16)).node
    cache.lock(node)
    cache.lock(node)
    cache.unlock(node)
    assert (cache.protected_pages, cache.evictable_pages) == (4, 1)
    assert cache.evict(9) == 1 and num_cached(cache, range(20)) == 16
    cache.unlock(node)
    assert cache.evict(9) == 4


def test_splitting_keeps_locks(cache: RadixCache):
    insert(cache, range(16))
    match = cache.match_prefix(range(16))
    cache.lock(match.node)
    insert(cache, [*range(8), 1, 1, 1, 1])
    assert cache.protected_pages == 4 and cache.evict(9) == 1
    cache.unlock(match.node)
    assert cache.protected_pages == 0
    cache.check_integrity()


def test_locked_donor_outlives_a_split_and_an_eviction(cache: RadixCache):
    pages = insert(cache, range(16))
    match = cache.match_prefix([0, 1, 9])
    cache.lock(match.donor)
    num_cached(cache, range(8))
    assert cache.evict(9) == 0 and match.donor_page == pages[0]
    cache.unlock(match.donor)
    assert cache.evict(9) == 4


def test_refuses_locks_that_make_no_sense(cache: RadixCache):
    insert(cache, range(4))
    node = cache.match_prefix(range(4)).node
    with pytest.raises(ValueError, match="not locked"):
        cache.unlock(node)
    cache.evict(1)
    with pytest.raises(ValueError, match="no longer cached"):
        cache.lock(node)


def test_root_of_an_empty_match_can_be_locked(cache: RadixCache):
    match = cache.match_prefix(range(9))
    cache.lock(match.node)
    insert(cache, range(9))
    cache.unlock(match.node)
    assert (cache.protected_pages, cache.evictable_pages) == (0, 3)
    cache.check_integrity()


def test_reset_frees_all_but_not_under_a_lock(cache: RadixCache):
    insert(cache, range(8))
    insert(cache, range(9), namespace="other")
    node = cache.match_prefix(range(8)).node
    cache.lock(node)
    with pytest.raises(ValueError, match="2 pages are in use"):
        cache.reset()
    cache.unlock(node)
    cache.reset()
    assert cache.allocator.num_used == cache.total_pages == num_cached(cache, range(8)) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda node: setattr(node, "lock_count", 1),
        lambda node: node.pages.append(9),
        lambda node: node.pages.__setitem__(0, 0),
        lambda node: node.parent.keys.reverse(),
        lambda node: node.parent.children.pop(),
        lambda node: setattr(node, "tokens", node.tokens[:4]),
    ],
    ids=["lock", "one page more", "trash page", "order", "children", "tokens"],
)
def test_check_integrity_notices(cache: RadixCache, damage):
    insert(cache, [1] * 9)
    insert(cache, [2] * 9)
    damage(next(node for node in cache.nodes() if node.children))
    with pytest.raises(AssertionError):
        cache.check_integrity()


# The shadow

TestShadow = RadixMachine.TestCase
TestShadow.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)

"""The free list: every page has one owner, and page 0 none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.page_allocator import PageAllocator


def test_hands_out_every_page_but_the_trash_page_once():
    allocator = PageAllocator(8)
    pages = [page for _ in range(7) for page in allocator.allocate(1)]
    assert sorted(pages) == [1, 2, 3, 4, 5, 6, 7]
    assert allocator.num_free == 0 and allocator.num_used == 7
    allocator.check_integrity()


def test_too_many_pages_change_nothing():
    allocator = PageAllocator(8)
    allocator.allocate(3)
    assert allocator.allocate(5) is None
    assert allocator.num_free == 4 and allocator.num_used == 3
    assert len(allocator.allocate(4)) == 4
    allocator.check_integrity()


def test_no_pages_are_always_to_be_had():
    allocator = PageAllocator(2)
    assert allocator.allocate(1) == [1]
    assert allocator.allocate(0) == []
    allocator.free([])
    assert allocator.num_free == 0


def test_freed_pages_are_handed_out_again():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    allocator.free([pages[1]])
    assert allocator.allocate(1) == [pages[1]]


@pytest.mark.parametrize("page", [0, 1, 3, 4, 100, -1, -4])
def test_freeing_a_page_that_is_not_in_use_raises(page):
    allocator = PageAllocator(4)
    allocator.free(allocator.allocate(1))
    with pytest.raises(ValueError, match=f"page {page} is not in use"):
        allocator.free([page])
    allocator.check_integrity()
    assert allocator.num_free == 3


def test_freeing_a_page_twice_in_one_call_raises():
    allocator = PageAllocator(4)
    (page,) = allocator.allocate(1)
    with pytest.raises(ValueError, match=f"page {page} is not in use"):
        allocator.free([page, page])
    allocator.check_integrity()


@given(st.integers(2, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_pages_are_conserved(num_pages, operations):
    allocator, owned = PageAllocator(num_pages), []
    for is_free, number in operations:
        if is_free and owned:
            allocator.free(owned.pop(number % len(owned)))
        elif (pages := allocator.allocate(number)) is not None:
            assert len(pages) == number
            owned.append(pages)
        allocator.check_integrity()
        held = [page for pages in owned for page in pages]
        assert len(set(held)) == len(held) == allocator.num_used
        assert allocator.num_free + allocator.num_used == num_pages - 1
        assert all(0 < page < num_pages for page in held)


def test_integrity_check_sees_a_page_with_two_owners():
    allocator = PageAllocator(4)
    allocator._free.append(1)
    with pytest.raises(AssertionError):
        allocator.check_integrity()

"""Which pages of the KV cache are free."""


class PageAllocator:
    """A free list of the pages 1 to `num_pages - 1`; page 0 is the trash page."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # taken from the end: page 1 first
        self._is_free = bytearray([0] + [1] * (num_pages - 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None and nothing changed where there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: list[int]) -> None:
        """Raises ValueError for a page that is not in use: it would get two owners."""
        for page in pages:
            if not 0 < page < self.num_pages or self._is_free[page]:
                raise ValueError(f"page {page} is not in use")
            self._is_free[page] = 1
            self._free.append(page)

    def check_integrity(self) -> None:
        assert sorted(self._free) == [p for p, is_free in enumerate(self._is_free) if is_free]
        assert not self._is_free[0], "the trash page is never handed out"

"""Who holds which page: pure accounting, no tensors.

A page holds the state of ``page_tokens`` tokens over all layers. Numbers below ``num_pages`` are *frames*, memory for
all layers of a page; those from there on are *transit slots*, memory for the few layers of a page that are in hand
while it streams past. Ownership, of both:

| state | refcount | who may release |
|---|---|---|
| free | 0 | nobody |
| held | n ≥ 1 | each of its n holders, once |

``acquire`` prefers a contiguous run of page ids, because attention then sees a sequence's keys as one view and copies
nothing: best right after the pages that a sequence shares already, else anywhere; it takes scattered pages only when
no run is long enough. ``check_integrity`` verifies the table.
"""

from __future__ import annotations

LAYERS_AHEAD = 1  # whose stored pages are being read while a layer computes
LAYERS_IN_HAND = LAYERS_AHEAD + 1


class PagePool:
    """*num_pages* frames and *num_transit* transit slots, counted."""

    def __init__(self, num_pages: int, page_tokens: int, num_transit: int = 0) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_transit = num_transit
        self._refcounts = [0] * (num_pages + num_transit)
        self._is_held = bytearray(num_pages)  # the same of frames, 0 or 1: runs are found in it at memory's speed
        self._num_free = num_pages
        self.peak_used = 0

    @property
    def num_free(self) -> int:
        """Frames nobody holds."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Frames somebody holds."""
        return self.num_pages - self._num_free

    @property
    def num_tokens(self) -> int:
        """Tokens that all frames together hold."""
        return self.num_pages * self.page_tokens

    def pages_for(self, num_tokens: int) -> int:
        """Pages that *num_tokens* tokens need."""
        return -(-num_tokens // self.page_tokens)

    def refcount(self, page: int) -> int:
        """How many hold *page*."""
        return self._refcounts[page]

    def is_transit(self, page: int) -> bool:
        """Whether *page* is a transit slot."""
        return page >= self.num_pages

    def acquire_transit(self, count: int) -> list[int] | None:
        """*count* transit slots with one holder each, neighbours if there are, or ``None`` if fewer are free."""
        slots = range(self.num_pages, self.num_pages + self.num_transit)
        free = [slot for slot in slots if not self._refcounts[slot]]
        if count > len(free):
            return None
        for slot in free[:count]:
            self._refcounts[slot] = 1
        return free[:count]

    def acquire(self, count: int, after: int | None = None) -> list[int] | None:
        """*count* frames with one holder each, or ``None`` (and no change) if fewer are free.

        Those that follow the page *after*, if they are free.
        """
        if count > self._num_free:
            return None
        free = bytes(count)
        first = -1 if after is None or not self._is_held.startswith(free, after + 1) else after + 1
        if first < 0:
            first = self._is_held.find(free)
        pages = list(range(first, first + count)) if first >= 0 else self._find_scattered(count)
        for page in pages:
            self._refcounts[page] = self._is_held[page] = 1
        self._num_free -= count
        self.peak_used = max(self.peak_used, self.num_used)
        return pages

    def share(self, pages: list[int]) -> None:
        """One more holder for each of *pages*, which must be held already."""
        for page in pages:
            assert self._refcounts[page], f"page {page} is free: it cannot be shared"
            self._refcounts[page] += 1

    def release(self, pages: list[int]) -> None:
        """One holder fewer for each of *pages*; pages without a holder are free."""
        for page in pages:
            assert self._refcounts[page], f"page {page} is free: it cannot be released"
            self._refcounts[page] -= 1
            if not self._refcounts[page] and not self.is_transit(page):
                self._num_free += 1
                self._is_held[page] = 0

    def check_integrity(self, holders: list[list[int]]) -> None:
        """Raise ``AssertionError`` unless *holders* (every page table there is) account for all references."""
        counts = [0] * len(self._refcounts)
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._refcounts, "reference counts differ from the page tables"
        free = counts[: self.num_pages].count(0)
        assert self._num_free == free, f"{self._num_free} free frames counted, {free} there"
        assert self._is_held == bytearray(map(bool, counts[: self.num_pages])), "a frame is held, or free, unnoticed"

    def _find_scattered(self, count: int) -> list[int]:
        """The first *count* free pages; there are as many."""
        pages: list[int] = []
        page = -1
        for _ in range(count):
            page = self._is_held.find(0, page + 1)
            pages.append(page)
        return pages

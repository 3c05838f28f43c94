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
        pages = [] if after is None else list(range(after + 1, min(after + 1 + count, self.num_pages)))
        if len(pages) < count or any(self._refcounts[page] for page in pages):
            pages = (
                self._find_run(count) or [page for page in range(self.num_pages) if not self._refcounts[page]][:count]
            )
        for page in pages:
            self._refcounts[page] = 1
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
            self._num_free += not self._refcounts[page] and not self.is_transit(page)

    def check_integrity(self, holders: list[list[int]]) -> None:
        """Raise ``AssertionError`` unless *holders* (every page table there is) account for all references."""
        counts = [0] * len(self._refcounts)
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._refcounts, "reference counts differ from the page tables"
        free = counts[: self.num_pages].count(0)
        assert self._num_free == free, f"{self._num_free} free frames counted, {free} there"

    def _find_run(self, count: int) -> list[int] | None:
        """The first *count* neighbouring free pages."""
        run = 0
        for page, refs in enumerate(self._refcounts[: self.num_pages]):
            run = 0 if refs else run + 1
            if run == count:
                return list(range(page - count + 1, page + 1))
        return None

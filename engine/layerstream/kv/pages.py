"""Who holds which page: pure accounting, no tensors.

A page holds the state of ``page_tokens`` tokens over all layers. Ownership:

| state | refcount | who may release |
|---|---|---|
| free | 0 | nobody |
| held | n ≥ 1 | each of its n holders, once |

``acquire`` prefers a contiguous run of page ids, because attention then sees a sequence's keys as one view and copies
nothing: best right after the pages that a sequence shares already, else anywhere; it takes scattered pages only when
no run is long enough. ``check_integrity`` verifies the table.
"""

from __future__ import annotations


class PagePool:
    """*num_pages* pages, counted."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._refcounts = [0] * num_pages
        self._num_free = num_pages
        self.peak_used = 0

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Pages somebody holds."""
        return self.num_pages - self._num_free

    @property
    def num_tokens(self) -> int:
        """Tokens that all pages together hold."""
        return self.num_pages * self.page_tokens

    def pages_for(self, num_tokens: int) -> int:
        """Pages that *num_tokens* tokens need."""
        return -(-num_tokens // self.page_tokens)

    def refcount(self, page: int) -> int:
        """How many hold *page*."""
        return self._refcounts[page]

    def acquire(self, count: int, after: int | None = None) -> list[int] | None:
        """*count* pages with one holder each, or ``None`` (and no change) if fewer are free.

        Those that follow the page *after*, if they are free.
        """
        if count > self._num_free:
            return None
        pages = [] if after is None else list(range(after + 1, min(after + 1 + count, self.num_pages)))
        if len(pages) < count or any(self._refcounts[page] for page in pages):
            pages = self._find_run(count) or [page for page, refs in enumerate(self._refcounts) if not refs][:count]
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
            self._num_free += not self._refcounts[page]

    def check_integrity(self, holders: list[list[int]]) -> None:
        """Raise ``AssertionError`` unless *holders* (every page table there is) account for all references."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._refcounts, "reference counts differ from the page tables"
        assert self._num_free == counts.count(0), f"{self._num_free} free pages counted, {counts.count(0)} there"

    def _find_run(self, count: int) -> list[int] | None:
        """The first *count* neighbouring free pages."""
        run = 0
        for page, refs in enumerate(self._refcounts):
            run = 0 if refs else run + 1
            if run == count:
                return list(range(page - count + 1, page + 1))
        return None

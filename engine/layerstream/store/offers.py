"""What of a stored prefix may be loaded. Pure.

Where all layers keep pages, that is what is stored of them in a row. Recurrent layers go on only from a snapshot, so it
is the pages up to the last one. A snapshot may lie before pages that are in memory already: then it alone is loaded,
and saves computing them once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerstream.store.segment import Key
from layerstream.store.tiers.base import PageFacts


@dataclass(frozen=True, slots=True)
class Snapshot:
    """States that are stored: those after *boundary* pages."""

    boundary: int
    facts: PageFacts


@dataclass(frozen=True, slots=True)
class Found:
    """What a tier has: pages in a row, and snapshots after one of them or after one in memory, in order."""

    pages: Sequence[PageFacts] = ()
    snapshots: Sequence[Snapshot] = ()

    def without(self, is_lost: Callable[[Key], bool]) -> Found:
        """Less what was lost since, and pages that follow on one that was."""
        whole = next((at for at, facts in enumerate(self.pages) if is_lost(facts.key)), len(self.pages))
        return Found(self.pages[:whole], [item for item in self.snapshots if not is_lost(item.facts.key)])


@dataclass(frozen=True, slots=True)
class Offer:
    """*num_pages* and the snapshot after *boundary* pages (0: none) that can be loaded: *num_bytes*.

    They save computing *num_computed* pages, which took *seconds*.
    """

    num_pages: int
    num_computed: int
    boundary: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for: of ``keys``, the pages from *start* on. The others are in memory.

    Attributes:
        resumable: where there are recurrent layers: after how many pages, at most *start*, their states are in memory.
            Snapshots after more of them are asked for as well, and what is known of the pages from there on.
        has_pages: False where pages have no bytes, and so are there without being stored.
    """

    keys: Sequence[Key]
    start: int
    resumable: int | None = None
    has_pages: bool = True

    @property
    def first(self) -> int:
        """The first page that facts are wanted of."""
        return self.start if self.resumable is None else self.resumable

    def offer(self, found: Found) -> Offer | None:
        """What of *found* may be loaded, instead of being computed again."""
        if self.resumable is None:
            pages, count = found.pages, len(found.pages)
            num_bytes, seconds = sum(facts.num_bytes for facts in pages), sum(facts.seconds for facts in pages)
            return Offer(count, count, 0, num_bytes, seconds) if pages else None
        stop = self.stop(found.pages)
        snapshots = [item for item in found.snapshots if item.boundary <= stop]
        if not snapshots:
            return None
        last = snapshots[-1]
        computed = found.pages[: last.boundary - self.first]
        loaded = found.pages[self.start - self.first : last.boundary - self.first]
        return Offer(
            num_pages=max(0, last.boundary - self.start),
            num_computed=last.boundary - self.resumable,
            boundary=last.boundary,
            num_bytes=last.facts.num_bytes + sum(facts.num_bytes for facts in loaded),
            seconds=sum(facts.seconds for facts in (computed if self.has_pages else (s.facts for s in snapshots))),
        )

    def known(self, pages: Sequence[PageFacts]) -> int:
        """How many pages in a row some prompt has had, where there are recurrent layers: they are in memory, or stored
        as *pages* from :attr:`first` on. Pages without bytes are not known to have been there."""
        return self.start if self.resumable is None or not self.has_pages else self.stop(pages)

    def stop(self, pages: Sequence[PageFacts]) -> int:
        """How many pages are at hand, or can be, where *pages* from :attr:`first` on are stored."""
        return max(self.start, self.first + len(pages)) if self.has_pages else len(self.keys)

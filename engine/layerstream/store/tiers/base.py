"""What the store asks of a place that keeps pages.

Pages are immutable and named by their content (a key says all tokens from position 0 on; the namespace says model,
arithmetic and tenant), so a tier never updates, two writers of one key write the same bytes, and losing a page costs
no more than computing it again. Snapshots of recurrent layers are pages here, which continue the page that they were
taken after. A tier that fails raises ``OSError`` or ``sqlite3.Error``, which
:class:`~layerstream.store.connection.TierConnection` keeps from requests; a tier may be slow, but for ``open``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from layerstream.kv.shape import PageShape
from layerstream.store.answers import RememberedAnswer
from layerstream.store.retrievals import Retrieval
from layerstream.store.segment import Buffers, Key, SegmentInfo

Consume = Callable[[memoryview], None]
Done = Callable[[Exception | None], None]


@dataclass(frozen=True, slots=True)
class PageFacts:
    """What is known of a stored page without reading it: its bytes, and what computing it took."""

    key: Key
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class NewPages:
    """Consecutive pages to keep.

    Attributes:
        keys, parent: as in :class:`~layerstream.store.segment.SegmentInfo`.
        encode_layer: the encoded page-layers of a layer, page by page.
        seconds: what computing them took.
        pinned: keep them from eviction.
    """

    keys: tuple[Key, ...]
    parent: Key
    page_tokens: int
    codec: str
    shapes: tuple[PageShape, ...]
    encode_layer: Callable[[int], Sequence[Buffers]]
    num_bytes: int
    seconds: float
    pinned: bool = False


class StoredRun(Protocol):
    """Consecutive stored pages, held open: they stay readable until ``close``."""

    @property
    def info(self) -> SegmentInfo:
        """What the pages are stored with."""
        ...

    @property
    def slots(self) -> range:
        """Which pages of the segment they are."""
        ...

    def read(self, layer: int, slots: range, consume: Consume, done: Done) -> None:
        """Bring the page-layers *slots* of *layer*, padded, to *consume* on some thread; then call *done* once."""
        ...

    def close(self) -> None:
        """No more reads. Idempotent."""
        ...


class Tier(Protocol):
    """Keeps pages of one namespace."""

    def contains(self, keys: Sequence[Key]) -> list[PageFacts]:
        """The longest prefix of *keys* that is here."""
        ...

    def any_of(self, keys: Sequence[Key]) -> list[PageFacts]:
        """Those of *keys* that are here, in order, whatever is missing between them."""
        ...

    def open(self, keys: Sequence[Key]) -> list[StoredRun]:
        """Runs that together are *keys*, or as many of them, from the first on, as are still here.

        Only what ``contains`` or ``any_of`` has found or ``put`` has written is looked for; also after ``close``. Waits
        for nothing.
        """
        ...

    def put(self, pages: NewPages) -> int:
        """Keep *pages*; the bytes written, 0 if they are here already or there is no room."""
        ...

    def room(self) -> tuple[int, int]:
        """Bytes that are stored, of all namespaces, and how many may be."""
        ...

    def pin(self, keys: Sequence[Key]) -> None:
        """Keep *keys* from eviction."""
        ...

    def drop(self, key: Key) -> None:
        """Page *key* is damaged: forget it and all that descend from it."""
        ...

    def claim(self, keys: Sequence[Key]) -> bool:
        """Announce that *keys* are going to be computed here. False if another process computes the first already."""
        ...

    def announce(self, keys: Sequence[Key]) -> None:
        """*keys* are computed, and will be here in a moment."""
        ...

    def is_announced(self, keys: Collection[Key]) -> bool:
        """Whether another process has announced one of *keys* lately, and it is not here yet."""
        ...

    def unclaim(self, keys: Sequence[Key]) -> None:
        """*keys* are not going to be computed, or written, here after all."""
        ...

    def remember(self, item: RememberedAnswer) -> bool:
        """Keep an answer; whether that was done."""
        ...

    def recall(self, prefixes: Sequence[Key]) -> list[list[int]]:
        """Questions with their answers that hang on *prefixes*, the most recent first."""
        ...

    def note_retrieved(self, item: Retrieval) -> None:
        """Documents were retrieved."""
        ...

    def retrieved(self, item: Retrieval) -> list[float]:
        """How often each document of *item* was retrieved, faded."""
        ...

    def tick(self) -> None:
        """Called every few seconds: renew claims, note uses."""
        ...

    def close(self) -> None:
        """Give back what is held, but for runs that are open."""
        ...

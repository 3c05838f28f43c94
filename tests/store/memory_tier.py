"""A tier in memory that fails, or is stuck, when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.shape import PageShape
from layerstream.kv.state import LayerState, PageMemory
from layerstream.kv.stored import Published
from layerstream.store.answers import RememberedAnswer
from layerstream.store.choice import Rates
from layerstream.store.codecs import CODECS
from layerstream.store.retrievals import RecentRetrievals, Retrieval
from layerstream.store.store import PrefixStore
from layerstream.store.tiers.base import NewPages, PageFacts, StoredRun


class MemoryTier:
    """Keeps keys; ``errors`` are raised by the methods that they are named by, ``gate`` holds up all of them."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.claimed: set[bytes] = set()
        self.announced_elsewhere: set[bytes] = set()
        self.pinned: set[bytes] = set()
        self.answers: list[RememberedAnswer] = []
        self.retrievals = RecentRetrievals()
        self.errors: dict[str, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.is_full = False
        self.is_closed = False

    def _enter(self, name: str) -> None:
        assert self.gate.wait(60)
        if name in self.errors:
            raise self.errors[name]

    def contains(self, keys: Sequence[bytes]) -> list[PageFacts]:
        self._enter("contains")
        count = next((at for at, key in enumerate(keys) if key not in self.keys), len(keys))
        return [PageFacts(key, 100, 1.0) for key in keys[:count]]

    def any_of(self, keys: Sequence[bytes]) -> list[PageFacts]:
        self._enter("any_of")
        return [PageFacts(key, 1000, 1.0) for key in keys if key in self.keys]

    def open(self, keys: Sequence[bytes]) -> list[StoredRun]:
        if "open" in self.errors:
            raise self.errors["open"]
        return []

    def put(self, pages: NewPages) -> int:
        self._enter("put")
        if self.is_full:
            return 0
        self.keys.update(pages.keys)
        self.claimed.difference_update(pages.keys)
        return pages.num_bytes or 1

    def room(self) -> tuple[int, int]:
        self._enter("room")
        return len(self.keys), 1000

    def pin(self, keys: Sequence[bytes]) -> None:
        self._enter("pin")
        self.pinned.update(keys)

    def drop(self, key: bytes) -> None:
        self._enter("drop")
        self.keys.discard(key)

    def claim(self, keys: Sequence[bytes]) -> bool:
        self._enter("claim")
        self.claimed.update(keys)
        return True

    def announce(self, keys: Sequence[bytes]) -> None:
        self._enter("announce")
        self.claimed.update(keys)

    def is_announced(self, keys: Collection[bytes]) -> bool:
        self._enter("is_announced")
        return not self.announced_elsewhere.isdisjoint(keys)

    def unclaim(self, keys: Sequence[bytes]) -> None:
        self._enter("unclaim")
        self.claimed.difference_update(keys)

    def remember(self, item: RememberedAnswer) -> bool:
        self._enter("remember")
        self.answers.append(item)
        return True

    def recall(self, prefixes: Sequence[bytes]) -> list[list[int]]:
        self._enter("recall")
        return [[*item.question, *item.answer] for item in self.answers]

    def note_retrieved(self, item: Retrieval) -> None:
        self._enter("note_retrieved")
        self.retrievals.note(item)

    def retrieved(self, item: Retrieval) -> list[float]:
        self._enter("retrieved")
        return self.retrievals.counts(item)

    def tick(self) -> None:
        self._enter("tick")

    def close(self) -> None:
        self.is_closed = True
        if "close" in self.errors:
            raise self.errors["close"]


def a_layer() -> LayerState:
    """One that keeps pages; nothing is in them."""
    layer = LayerState(4, 4, PageMemory(4096))
    layer.reserve(PageShape(1, 4, 1, 4, "float32"))
    return layer


def open_store(tier: MemoryTier, recurrent: Sequence[RecurrentLayer] = ()) -> PrefixStore:
    """A store on *tier*, with a model of one layer that keeps pages, and *recurrent* ones."""
    return PrefixStore(
        [a_layer()], 4, CODECS["none"], lambda: Rates(1e9, 1.0, 96), tier=tier,
        open_tier=lambda is_stopped: tier, is_current=lambda: True, load="always", recurrent=recurrent,
    )  # type: ignore[arg-type]  # fmt: skip


def batch(keys: Sequence[bytes], first_page: int = 0, *, is_spilled: bool = False) -> Published:
    """*keys*, in consecutive frames."""
    return Published(tuple(keys), b"", tuple(range(first_page, first_page + len(keys))), is_spilled)

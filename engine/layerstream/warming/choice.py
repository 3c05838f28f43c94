"""Which documents are warmed: the most popular, as far as there is room. Pure: sizes in, a choice out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.api import arguments
from layerstream.core.sizes import parse_size

MOST_MISSES = 16
STORE_SHARE = 0.9
"""Of the store's bound that warmed documents may take: the rest is for what questions leave, and for headers."""


def ranked(texts: Sequence[str], popularity: Sequence[float], top: int | None = None) -> list[str]:
    """*texts*, the most popular first, equals as they came, each once; at most *top* of them."""
    order = sorted(range(len(texts)), key=lambda at: -popularity[at])
    return list(dict.fromkeys(texts[at] for at in order))[:top]


class Corpus:
    """Documents to choose from.

    Args:
        popularity: of each of *texts*.
        top: so many at most.
        budget: bytes that they may take, or a size such as ``"20GB"``.

    Attributes:
        texts: each once.
        order: those that may be warmed, the most popular first.

    Raises:
        ConfigurationError: *top* or *budget* cannot be meant.
    """

    def __init__(
        self, texts: Sequence[str], popularity: Sequence[float], top: int | None = None, budget: int | str | None = None
    ) -> None:
        self._popularity = dict(zip(texts, popularity, strict=True))
        most = None if top is None else arguments.whole_number("top", top, 1)
        self.budget_bytes = None if budget is None else parse_size(budget)
        self.texts = list(self._popularity)
        self.order = ranked(self.texts, list(self._popularity.values()), most)

    def coverage(self, chosen: Sequence[str]) -> float | None:
        """Which share of the retrievals so far were of *chosen*; ``None``: nobody knows."""
        if len(chosen) == len(self.texts):
            return 1.0
        return share_of([self._popularity[text] for text in chosen], list(self._popularity.values()))


def share_of(chosen: Sequence[float], given: Sequence[float]) -> float | None:
    """Which share of the popularity *given* the *chosen* have; ``None``: nothing was retrieved yet."""
    total = sum(given)
    return sum(chosen) / total if total > 0 else None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What pages of a prefix take on disk: *snapshot_bytes* once at its end, and for every *stride* pages."""

    page_bytes: int
    snapshot_bytes: int = 0
    stride: int = 1

    def of(self, num_pages: float) -> float:
        """Bytes of *num_pages* that one prefix adds."""
        num_snapshots = 1 + num_pages // self.stride if num_pages and self.snapshot_bytes else 0
        return num_pages * self.page_bytes + num_snapshots * self.snapshot_bytes


class Allowance:
    """*room* bytes, given to one document after the other.

    One that does not fit is left out and a smaller one behind it may still fit; after :data:`MOST_MISSES` in a row it
    is :attr:`spent`.
    """

    def __init__(self, room: float) -> None:
        self.room = room
        self.taken = 0.0
        self._misses = 0

    @property
    def spent(self) -> bool:
        """Whether it is not worth asking any more."""
        return self._misses >= MOST_MISSES

    def admit(self, num_bytes: float) -> bool:
        """Whether there is room for *num_bytes*; they are then taken."""
        if self.taken + num_bytes > self.room:
            self._misses += 1
            return False
        self.taken += num_bytes
        self._misses = 0
        return True

"""What scheduling says to a store, and what it hears: pages to load, pages to keep. Nouns and a protocol.

Scheduling knows no store; :class:`~layerstream.store.store.PrefixStore` is one, tests have others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from layerstream.kv.keys import Key


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store has of a prefix: pages to load now, and pages that it is faster to compute again.

    Of a model with recurrent layers, ``snapshot`` is the number of pages at whose end it has their states, 0: nowhere;
    ``num_known`` how many pages in a row some prompt has had before: they are in memory or stored.
    """

    num_pages: int
    num_declined: int
    snapshot: int = 0
    num_known: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """Consecutive pages that were just computed; ``parent`` is the key before the first.

    ``is_spilled``: their sequence goes on only when they are stored.
    """

    keys: tuple[Key, ...]
    parent: Key
    pages: tuple[int, ...]
    is_spilled: bool = False


@dataclass(frozen=True, slots=True)
class PublishedState:
    """The states of recurrent layers after the page *key*, in *slot*; computing from the last snapshot to there took
    *num_tokens* tokens."""

    key: Key
    slot: int
    num_tokens: int


class SpillStore(Protocol):
    """What the scheduler asks of a store. Nothing here raises, or waits for more than a moment.

    ``can_spill`` and what follows are for sequences whose pages do not fit the memory.
    """

    def take(self, keys: Sequence[Key], start: int, resumable: int | None = None) -> Stored | None:
        """What is there of ``keys[start:]``; ``None``: not known yet, or another process is at it: ask again later.

        Args:
            resumable: of a model with recurrent layers, the number of pages at whose end their states are at hand. What
                is there beyond then counts up to the last page whose states are there as well (``Stored.snapshot``).
        """
        ...

    def collect_slots(self) -> list[int]:
        """Slots of states that were published and that need not be held any longer."""
        ...

    def give_back_slots(self) -> list[int]:
        """Slots that can be had by not storing what is in them."""
        ...

    def abandon(self, keys: Sequence[Key]) -> None:
        """*keys* are not going to be computed."""
        ...

    def collect(self) -> list[int]:
        """Frames that ``publish`` was given and that need not be held any longer."""
        ...

    def give_back(self) -> list[int]:
        """Frames that can be had by not storing what is in them."""
        ...

    @property
    def can_spill(self) -> bool | None:
        """Whether it takes pages; ``None``: not known yet."""
        ...

    def count_stored(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, are stored as far as was seen: asked for, or written here."""
        ...

    def has_given_up(self, key: Key) -> bool:
        """Whether page *key*, whose sequence waits for it, could not be stored since it was published last."""
        ...

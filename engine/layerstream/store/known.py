"""What a store knows of keys without asking its tier. Any thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from layerstream.store.segment import Key

MOST_STORED = 2**17  # keys that are known to be stored


class KnownKeys:
    """Which keys are stored, as far as was seen here; lost; pinned; and given up, though somebody waits for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored: OrderedDict[Key, None] = OrderedDict()
        self._lost: set[Key] = set()
        self._pinned: set[Key] = set()
        self._given_up: set[Key] = set()

    def count_stored(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, are stored."""
        with self._lock:
            return next((count for count, key in enumerate(keys) if key not in self._stored), len(keys))

    def found(self, keys: Iterable[Key]) -> None:
        """*keys* are stored."""
        with self._lock:
            self._stored.update(dict.fromkeys(keys))
            while len(self._stored) > MOST_STORED:
                self._stored.popitem(last=False)

    def written(self, keys: Sequence[Key]) -> None:
        """*keys* are stored, and whole if they were lost before."""
        self.found(keys)
        with self._lock:
            self._lost.difference_update(keys)

    def lose(self, key: Key) -> None:
        """What is stored under *key* is not to be used."""
        with self._lock:
            self._stored.pop(key, None)
            self._lost.add(key)

    def is_lost(self, key: Key) -> bool:
        """Whether *key* was lost and not written again."""
        return key in self._lost

    def pin(self, keys: Iterable[Key]) -> None:
        """Whatever is stored under *keys* is to stay."""
        with self._lock:
            self._pinned.update(keys)

    def pinned(self) -> tuple[Key, ...]:
        """All keys that were pinned."""
        with self._lock:
            return tuple(self._pinned)

    def is_pinned(self, keys: Iterable[Key]) -> bool:
        """Whether one of *keys* is."""
        return not self._pinned.isdisjoint(keys)

    def give_up(self, keys: Iterable[Key]) -> None:
        """*keys*, which somebody waits for, are not going to be stored."""
        with self._lock:
            self._given_up.update(keys)

    def expect(self, keys: Iterable[Key]) -> None:
        """*keys* were published, once more perhaps."""
        with self._lock:
            self._given_up.difference_update(keys)

    def has_given_up(self, key: Key) -> bool:
        """Whether *key* was given up since it was published last."""
        return key in self._given_up

"""How often documents were retrieved, for callers: in the store's index where there is one, in memory while there is
none.

Any thread may ask. Counting never waits: the store's own thread writes. What was counted while the store was not there
(its digests were being taken, its disk was full) is written when it is; of a longer time without it, the last
:data:`MOST_WAITING` retrievals are. An answer that does not come in time comes from memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from layerstream.store.retrievals import RecentRetrievals, retrieval
from layerstream.store.store import PrefixStore

MOST_WAITING = 1000


class Popularity:
    """Counts retrievals.

    Args:
        store: where counts outlive the process.
        salt: keeps its tenants apart from those of other stores.
    """

    def __init__(self, store: PrefixStore | None, salt: str = "") -> None:
        self._store = store
        self._salt = salt
        self._lock = threading.Lock()
        self._recent = RecentRetrievals()
        self._waiting: deque = deque(maxlen=MOST_WAITING)

    def note(self, texts: Sequence[str], tenant: str = "") -> None:
        """*texts* were retrieved together for *tenant*."""
        if not texts:
            return
        item = retrieval(self._salt, tenant, texts)
        with self._lock:
            self._recent.note(item)
            if self._store is None:
                return
            self._waiting.append(item)
            self._write(self._store)

    def of(self, texts: Sequence[str], tenant: str = "") -> list[float]:
        """How often each of *texts* was retrieved for *tenant*, faded."""
        item = retrieval(self._salt, tenant, texts)
        with self._lock:
            if self._store is not None:
                self._write(self._store)
        found = None if self._store is None else self._store.retrieved(item)
        if found is not None:
            return found
        with self._lock:
            return self._recent.counts(item)

    def _write(self, store: PrefixStore) -> None:
        while self._waiting and store.note_retrieved(self._waiting[0]):
            self._waiting.popleft()

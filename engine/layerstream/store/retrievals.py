"""How often documents were retrieved, fading: which of them stand first in a context, and are worth computing ahead.

A document is known by a hash of its tenant and its text; no text is kept. A count halves every :data:`HALF_LIFE`
retrievals *of its tenant*: what nobody asks about any more gives way however fast the others ask, and a weekend
changes nothing.

What is kept of a document is one number, its *weight*: the logarithm of its count, as if it had not faded since the
tenant's first retrieval. Weights of one tenant therefore compare at all times, and only change when their document is
retrieved.

| table | a row | owner |
|---|---|---|
| ``retrievers`` | a tenant and the number of its retrievals, its clock | a transaction of :class:`StoredRetrievals` |
| ``retrieved`` | a document, its tenant, its weight | the same transaction; goes with its tenant |

Two processes that count at once lose nothing: a transaction reads and writes. There are at most
:data:`MOST_DOCUMENTS` (and those of a process's last :data:`TRIMMED_EVERY` retrievals); those that were not retrieved
for the longest time go, whoever their tenant is.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.store.index import Index

HALF_LIFE = 256.0
"""Retrievals after which a count is worth half."""

MOST_DOCUMENTS = 50_000
"""In one folder, of all tenants: 8 MB."""

TRIMMED_EVERY = 64
"""Retrievals of a process after which it looks whether there are more, which takes 10 to 20 ms."""

Name = bytes
"""What a tenant, or a document of one, is known by."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What was retrieved at once, and for which tenant."""

    tenant: Name
    documents: tuple[Name, ...]


def retrieval(salt: str, tenant: str, texts: Sequence[str]) -> Retrieval:
    """*texts* were retrieved for *tenant* of the store with *salt*; each counts once, wherever it is."""
    owner = hashlib.sha256(hashlib.sha256(_bytes(salt)).digest() + _bytes(tenant)).digest()
    return Retrieval(owner, tuple(hashlib.sha256(owner + _bytes(text)).digest() for text in texts))


def _bytes(text: str) -> bytes:
    """Of any text, one with half characters too."""
    return text.encode(errors="surrogatepass")


def add(weight: float | None, now: int) -> float:
    """The weight of a document after one more retrieval, the *now*-th of its tenant."""
    one = now / HALF_LIFE
    return one if weight is None else max(weight, one) + math.log2(1.0 + 2.0 ** -abs(weight - one))


def count(weight: float | None, now: int) -> float:
    """How often it was retrieved, faded until the *now*-th retrieval."""
    return 0.0 if weight is None else 2.0 ** (weight - now / HALF_LIFE)


class RecentRetrievals:
    """Counts in memory, for one process: while there is no store."""

    def __init__(self) -> None:
        self._weights: OrderedDict[Name, float] = OrderedDict()  # the last one retrieved last
        self._clocks: dict[Name, int] = {}

    def note(self, item: Retrieval) -> None:
        """Count *item*."""
        if len(self._clocks) >= MOST_DOCUMENTS and item.tenant not in self._clocks:
            self._clocks.clear()
            self._weights.clear()
        now = self._clocks[item.tenant] = self._clocks.get(item.tenant, 0) + 1
        for document in dict.fromkeys(item.documents):
            self._weights[document] = add(self._weights.pop(document, None), now)
        while len(self._weights) > MOST_DOCUMENTS:
            self._weights.popitem(last=False)

    def counts(self, item: Retrieval) -> list[float]:
        """How often each document of *item* was retrieved."""
        now = self._clocks.get(item.tenant, 0)
        return [count(self._weights.get(document), now) for document in item.documents]


class StoredRetrievals:
    """Counts in an index, which several processes share."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._num_noted = 0
        tables = index.connection().execute("SELECT 1 FROM sqlite_master WHERE name = 'retrieved'")
        self._is_there = tables.fetchone() is not None  # not in what an older version wrote and nobody may write to

    def note(self, item: Retrieval) -> None:
        """Count *item*."""
        moment = time.time()
        with self._index.transaction() as connection:
            owner, now = connection.execute(
                "INSERT INTO retrievers (name, retrievals) VALUES (?, 1) "
                "ON CONFLICT (name) DO UPDATE SET retrievals = retrievals + 1 RETURNING id, retrievals",
                (item.tenant,),
            ).fetchone()
            for document in dict.fromkeys(item.documents):
                row = connection.execute("SELECT weight FROM retrieved WHERE document = ?", (document,)).fetchone()
                connection.execute(
                    "INSERT INTO retrieved (document, tenant, weight, last_used) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (document) DO UPDATE SET weight = excluded.weight, last_used = excluded.last_used",
                    (document, owner, add(row and row[0], now), moment),
                )
            if self._num_noted % TRIMMED_EVERY == 0:
                _trim(connection)
            self._num_noted += 1

    def counts(self, item: Retrieval) -> list[float]:
        """How often each document of *item* was retrieved."""
        connection = self._index.connection()
        if not self._is_there:
            return [0.0] * len(item.documents)
        clock = connection.execute("SELECT retrievals FROM retrievers WHERE name = ?", (item.tenant,)).fetchone()
        if clock is None:
            return [0.0] * len(item.documents)
        found: list[float] = []
        for document in item.documents:
            row = connection.execute("SELECT weight FROM retrieved WHERE document = ?", (document,)).fetchone()
            found.append(count(row and row[0], clock[0]))
        return found

    def forget(self) -> None:
        """Nothing was retrieved."""
        with self._index.transaction() as connection:
            connection.execute("DELETE FROM retrievers")


def _trim(connection: sqlite3.Connection) -> None:
    """Forget the documents that are too many, and tenants without any."""
    gone = connection.execute(
        "DELETE FROM retrieved WHERE document IN (SELECT document FROM retrieved ORDER BY last_used DESC "
        "LIMIT -1 OFFSET ?)",
        (MOST_DOCUMENTS,),
    )
    if gone.rowcount:
        connection.execute(
            "DELETE FROM retrievers WHERE NOT EXISTS (SELECT 1 FROM retrieved WHERE tenant = retrievers.id)"
        )

"""Who computes which pages, and who is about to write which snapshots: leases in the index.

Invariants: a claim lasts as long as its owner renews it and its process is there; an announcement is not renewed, so
nobody waits for it longer than ``LEASE_SECONDS``; a page or snapshot that is entered has no lease any more
(:meth:`~layerstream.store.index.Index.add_segment`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Sequence

import psutil

from layerstream.store.database import Database
from layerstream.store.segment import Key

LEASE_SECONDS = 15.0


class Leases:
    """The leases in *database*, as *owner* takes them."""

    def __init__(self, database: Database, owner: str) -> None:
        self._database = database
        self.owner = owner
        self._writing = f"{owner}w"  # who announces

    def claim(self, namespace: int, keys: Sequence[Key]) -> bool:
        """Announce that this process computes *keys*. False, and no change, if another one computes the first."""
        now = time.time()
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT owner, expires FROM leases WHERE namespace = ? AND key = ?", (namespace, keys[0])
            ).fetchone()
            if row and row[0] != self.owner and _is_current(row[1], now) and is_alive(*row):
                return False
            connection.executemany(
                "INSERT INTO leases (namespace, key, owner, expires) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET owner = excluded.owner, expires = excluded.expires "
                "WHERE owner = excluded.owner OR expires < ? OR key = ?",
                [(namespace, key, self.owner, now + LEASE_SECONDS, now, keys[0]) for key in keys],
            )
            return True

    def announce(self, namespace: int, keys: Sequence[Key]) -> None:
        """This process is about to write *keys*; unlike a claim that is not renewed."""
        now = time.time()
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT INTO leases (namespace, key, owner, expires) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET owner = excluded.owner, expires = excluded.expires WHERE expires < ?",
                [(namespace, key, self._writing, now + LEASE_SECONDS, now) for key in keys],
            )

    def is_announced(self, namespace: int, keys: Collection[Key]) -> bool:
        """Whether another process is about to write one of *keys*."""
        now = time.time()
        leases = self._database.connection().execute(
            "SELECT key, owner, expires FROM leases WHERE namespace = ? AND owner != ?", (namespace, self._writing)
        )
        return any(key in keys and _is_current(expires, now) and is_alive(who, expires) for key, who, expires in leases)

    def renew(self) -> None:
        """This process is still at work on what it claimed."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE leases SET expires = ? WHERE owner = ?", (time.time() + LEASE_SECONDS, self.owner)
            )

    def unclaim(self, namespace: int, keys: Sequence[Key]) -> None:
        """This process does not compute, or write, *keys* any more."""
        with self._database.transaction() as connection:
            connection.executemany(
                "DELETE FROM leases WHERE namespace = ? AND key = ? AND owner IN (?, ?)",
                [(namespace, key, self.owner, self._writing) for key in keys],
            )

    def give_back(self) -> None:
        """This process computes nothing."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM leases WHERE owner IN (?, ?)", (self.owner, self._writing))


def new_owner() -> str:
    """Somebody in this process whom leases can be given to."""
    return f"{socket.gethostname()}:{os.getpid()}:{_born(os.getpid())}:{os.urandom(4).hex()}"


def is_alive(owner: str, expires: float) -> bool:
    """Whether *owner*'s process is there; of another host's (a shared volume), whether it was lately."""
    host, pid, born, _ = owner.rsplit(":", 3)
    if host != socket.gethostname():
        return _is_current(expires, time.time())
    return _born(int(pid)) == born


def _is_current(expires: float, now: float) -> bool:
    """Whether a lease runs; one from the far future is from before a jump of the clock."""
    return now <= expires <= now + 2 * LEASE_SECONDS


def _born(pid: int) -> str:
    """When process *pid* started, so that a number used again is not taken for its former bearer; empty if gone."""
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return ""

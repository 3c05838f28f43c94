"""What is where in a local store: one SQLite database, shared by all processes that use the folder.

The index is an accelerator: everything that matters for correctness is in the segments' footers, from which
:meth:`Index.add_segment` rebuilds it. What only the index has is use (frequency, pins, priorities), answers, how often
documents were retrieved, the digests of weight files, and leases.

Invariants, each kept by one transaction:

* a page's row points to a segment that is whole: rows of pages appear in the transaction that ends the writing;
* a page's parent is there too, or is the root (an empty key);
* bytes are reserved before a segment is written, so all writers together keep to the bound;
* a number that stood for a namespace or a segment never stands for another one.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerstream.store.database import BUSY_SECONDS, Database, IndexReplaced
from layerstream.store.eviction import Candidate
from layerstream.store.leases import LEASE_SECONDS, Leases, is_alive, new_owner
from layerstream.store.migrations import migrate
from layerstream.store.segment import Key, SegmentInfo

_AT_ONCE = 500  # parameters of one statement


@dataclass(frozen=True, slots=True)
class PageRow:
    """Where a page is."""

    key: Key
    segment: int
    name: str
    slot: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """A segment as people see it."""

    segment: int
    namespace: str
    name: str
    num_bytes: int
    num_pages: int
    seconds: float
    frequency: int
    pinned: int
    created: float
    last_used: float
    is_snapshot: int


class Index(Database):
    """The database at *path*; made if it is not there, unless *read_only*.

    Args:
        path: ``None``: in memory, for one thread.
        owner: whom leases are given to; ``None``: somebody new.
        busy_seconds: how long a statement waits for another process that writes.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        read_only: bool = False,
        owner: str | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        super().__init__(path, read_only=read_only, busy_seconds=busy_seconds)
        self._read_only = read_only
        self.leases = Leases(self, owner or new_owner())
        if not read_only:
            try:
                migrate(self.connection(), path)
                self._drop_unfinished()
            except BaseException:
                super().close()
                raise

    def close(self) -> None:
        """Give leases back, close all connections. Never raises."""
        if not self._read_only:
            with contextlib.suppress(sqlite3.Error, OSError):
                self.leases.give_back()
        super().close()

    # Namespaces

    def namespace_id(self, name: str, description: str = "") -> int | None:
        """The number of namespace *name*, entered if need be; ``None`` if it is not there and cannot be."""
        row = self.connection().execute("SELECT id FROM namespaces WHERE name = ?", (name,)).fetchone()
        if row is None and not self._read_only:
            with self.transaction() as connection:
                connection.execute(
                    "INSERT OR IGNORE INTO namespaces (id, name, description) VALUES (?, ?, ?)",
                    (_new_id(connection), name, description),
                )
                row = connection.execute("SELECT id FROM namespaces WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def check_namespace(self, number: int, name: str) -> None:
        """Raise :class:`IndexReplaced` unless *number* still stands for namespace *name*."""
        row = self.connection().execute("SELECT name FROM namespaces WHERE id = ?", (number,)).fetchone()
        if row != (name,):
            raise IndexReplaced(f"{self._path}: namespace {name} was removed")

    def namespaces(self) -> dict[str, str]:
        """Name and description of each."""
        return dict(self.connection().execute("SELECT name, description FROM namespaces"))

    def remove_namespace(self, name: str) -> None:
        """Forget *name* and all its segments and answers, so that they are not in the file any more either."""
        connection = self.connection()
        connection.execute("PRAGMA secure_delete = ON")
        with self.transaction():
            connection.execute("DELETE FROM namespaces WHERE name = ?", (name,))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # as far as nobody else reads just now

    # Pages

    def find(self, namespace: int, keys: Sequence[Key]) -> list[PageRow]:
        """The pages of the longest stored prefix of *keys*, in order."""
        found: list[PageRow] = []
        for at in range(0, len(keys), _AT_ONCE):
            some = keys[at : at + _AT_ONCE]
            by_key = self._rows(namespace, some)
            for key in some:
                if key not in by_key:
                    return found
                found.append(by_key[key])
        return found

    def any_of(self, namespace: int, keys: Sequence[Key]) -> list[PageRow]:
        """Those of *keys* that are stored, in order."""
        found: list[PageRow] = []
        for at in range(0, len(keys), _AT_ONCE):
            some = keys[at : at + _AT_ONCE]
            by_key = self._rows(namespace, some)
            found += [by_key[key] for key in some if key in by_key]
        return found

    def drop_pages(self, namespace: int, keys: Sequence[Key]) -> list[str]:
        """Forget pages *keys* and all that descend from them; names of segments that have no page left."""
        with self.transaction() as connection:
            connection.executemany(
                "WITH RECURSIVE gone (key) AS (VALUES (?) UNION SELECT p.key FROM pages p JOIN gone "
                "ON p.parent = gone.key WHERE p.namespace = ?) "
                "DELETE FROM pages WHERE namespace = ? AND key IN (SELECT key FROM gone)",
                [(key, namespace, namespace) for key in keys],
            )
            return self._drop_empty(connection)

    # Segments

    def reserve(self, namespace: int, name: str, num_bytes: int) -> int | None:
        """Count *num_bytes* for a segment about to be written; its number, or ``None`` if it is there already."""
        now = time.time()
        with self.transaction() as connection:
            number = _new_id(connection)
            cursor = connection.execute(
                "INSERT OR IGNORE INTO segments "
                "(id, namespace, name, num_bytes, num_pages, seconds, priority, created, last_used, writer) "
                "VALUES (?, ?, ?, ?, 0, 0, 0, ?, ?, ?)",
                (number, namespace, name, num_bytes, now, now, self.leases.owner),
            )
            return number if cursor.rowcount else None

    def add_segment(self, namespace: int, info: SegmentInfo, num_bytes: int, *, pinned: bool = False) -> bool:
        """The segment of *info* is whole: enter its pages, end its reservation.

        False, and no change, if its first page's parent is not there or all its pages are there already.
        """
        now = time.time()
        with self.transaction() as connection:
            if info.parent and not _has_page(connection, namespace, info.parent):
                return False
            what = (num_bytes, len(info.keys), info.seconds, int(pinned), int(info.is_snapshot))
            (segment,) = connection.execute(
                "INSERT INTO segments "
                "(id, namespace, name, created, last_used, num_bytes, num_pages, seconds, pinned, is_snapshot, "
                "priority) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0) ON CONFLICT (namespace, name) DO UPDATE SET "
                "num_bytes = excluded.num_bytes, num_pages = excluded.num_pages, seconds = excluded.seconds, "
                "pinned = max(pinned, excluded.pinned), is_snapshot = excluded.is_snapshot, writer = NULL RETURNING id",
                (_new_id(connection), namespace, info.name, now, now, *what),
            ).fetchone()
            connection.executemany(
                "INSERT OR IGNORE INTO pages (namespace, key, parent, segment, slot) VALUES (?, ?, ?, ?, ?)",
                [
                    (namespace, key, parent, segment, slot)
                    for slot, (key, parent) in enumerate(zip(info.keys, info.parents(), strict=True))
                ],
            )
            connection.executemany(
                "DELETE FROM leases WHERE namespace = ? AND key = ?", [(namespace, key) for key in info.keys]
            )
            (num_pages,) = connection.execute("SELECT count(*) FROM pages WHERE segment = ?", (segment,)).fetchone()
            if not num_pages:  # others wrote all of them, in other segments
                connection.execute("DELETE FROM segments WHERE id = ?", (segment,))
                return False
            _reprioritise(connection, [segment])
            return True

    def add_segments(self, namespace: int, found: Sequence[tuple[SegmentInfo, int]]) -> list[tuple[SegmentInfo, int]]:
        """Enter whole segments, with their lengths, in whatever order they come: parents first.

        Returns:
            Those that :meth:`add_segment` refuses for good.
        """
        left = list(found)
        while left:
            refused = [item for item in left if not self.add_segment(namespace, *item)]
            if len(refused) == len(left):
                break
            left = refused
        return left

    def names(self, namespace: int) -> dict[str, tuple[int, bool]]:
        """Number of each segment of *namespace*, and whether it is whole, by name."""
        rows = self.connection().execute("SELECT name, id, writer FROM segments WHERE namespace = ?", (namespace,))
        return {name: (number, writer is None) for name, number, writer in rows}

    def cancel(self, segment: int) -> None:
        """Nothing came of the reservation *segment*."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM segments WHERE id = ? AND writer IS NOT NULL", (segment,))

    def touch(self, segments: Sequence[int]) -> None:
        """*segments* were used once more."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE segments SET frequency = frequency + 1, last_used = ? WHERE id = ?",
                [(time.time(), segment) for segment in segments],
            )
            _reprioritise(connection, segments)

    def pin(self, namespace: int, keys: Sequence[Key]) -> None:
        """Keep the segments of those of *keys* that are here from eviction."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE segments SET pinned = 1 WHERE id = (SELECT segment FROM pages WHERE namespace = ? AND key = ?)",
                [(namespace, key) for key in keys],
            )

    def unpin(self, namespace: str) -> None:
        """Let the segments of namespace *namespace* be evicted again."""
        with self.transaction() as connection:
            connection.execute(
                "UPDATE segments SET pinned = 0 WHERE namespace = (SELECT id FROM namespaces WHERE name = ?)",
                (namespace,),
            )

    def segments(self) -> list[SegmentRow]:
        """Every whole segment."""
        rows = self.connection().execute(
            "SELECT s.id, n.name, s.name, s.num_bytes, s.num_pages, s.seconds, s.frequency, s.pinned, s.created, "
            "s.last_used, s.is_snapshot FROM segments s JOIN namespaces n ON n.id = s.namespace "
            "WHERE s.writer IS NULL ORDER BY s.id"
        )
        return [SegmentRow(*row) for row in rows]

    def total_bytes(self) -> int:
        """Of all segments, those being written included."""
        return self.connection().execute("SELECT coalesce(sum(num_bytes), 0) FROM segments").fetchone()[0]

    def candidates(self) -> list[Candidate]:
        """What eviction chooses from, with who depends on whom."""
        connection = self.connection()
        parents = dict(
            connection.execute(
                "SELECT DISTINCT child.segment, parent.segment FROM pages child JOIN pages parent "
                "ON parent.namespace = child.namespace AND parent.key = child.parent "
                "WHERE child.slot = 0 AND child.segment != parent.segment"
            )
        )
        rows = connection.execute("SELECT id, num_bytes, priority, pinned FROM segments WHERE writer IS NULL")
        return [Candidate(row[0], parents.get(row[0]), row[1], row[2], bool(row[3])) for row in rows]

    def keys_of(self, segment: int) -> list[Key]:
        """The pages that are in *segment*, in order."""
        rows = self.connection().execute("SELECT key FROM pages WHERE segment = ? ORDER BY slot", (segment,))
        return [key for (key,) in rows]

    def location(self, segment: int) -> tuple[str, str] | None:
        """Namespace and name of *segment*."""
        row = self.connection().execute(
            "SELECT n.name, s.name FROM segments s JOIN namespaces n ON n.id = s.namespace WHERE s.id = ?", (segment,)
        )
        return row.fetchone()

    def remove(self, segment: int, unlink: Callable[[], None] = lambda: None) -> bool:
        """Forget *segment*, unless another one has come to depend on it; whether that was done. Ages the clock.

        Args:
            unlink: called before anything is written, so that a full disk has room for it.
        """
        with self.transaction() as connection:
            dependants = connection.execute(
                "SELECT 1 FROM pages parent JOIN pages child ON child.namespace = parent.namespace "
                "AND child.parent = parent.key WHERE parent.segment = ? AND child.segment != ? LIMIT 1",
                (segment, segment),
            ).fetchone()
            if dependants:
                return False
            unlink()
            connection.execute(
                "UPDATE clock SET value = max(value, coalesce((SELECT priority FROM segments WHERE id = ?), 0))",
                (segment,),
            )
            connection.execute("DELETE FROM segments WHERE id = ?", (segment,))
            return True

    # Digests of files

    def digest(self, path: Path, stat: os.stat_result) -> str | None:
        """The SHA-256 that was taken of *path* when it was exactly this file."""
        row = self.connection().execute(
            "SELECT sha256 FROM digests WHERE path = ? AND inode = ? AND num_bytes = ? AND mtime_ns = ? "
            "AND ctime_ns = ?",
            (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns),
        )  # fmt: skip
        found = row.fetchone()
        return found and found[0]

    def remember_digest(self, path: Path, stat: os.stat_result, sha256: str) -> None:
        """Take *sha256* for *path* as long as it is exactly this file."""
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)",
                (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256),
            )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where an invariant of the module docstring does not hold."""
        connection = self.connection()
        (orphans,) = connection.execute(
            "SELECT count(*) FROM pages child WHERE child.parent != x'' AND NOT EXISTS "
            "(SELECT 1 FROM pages p WHERE p.namespace = child.namespace AND p.key = child.parent)"
        ).fetchone()
        assert not orphans, f"{orphans} pages without their parent"
        (unfinished,) = connection.execute(
            "SELECT count(*) FROM pages p JOIN segments s ON s.id = p.segment WHERE s.writer IS NOT NULL"
        ).fetchone()
        assert not unfinished, f"{unfinished} pages of segments that are not whole"

    def _rows(self, namespace: int, keys: Sequence[Key]) -> dict[Key, PageRow]:
        """Those of *keys*, not too many, that are stored."""
        marks = ",".join("?" * len(keys))
        rows = self.connection().execute(
            "SELECT p.key, s.id, s.name, p.slot, s.num_bytes / s.num_pages, s.seconds / s.num_pages "
            f"FROM pages p JOIN segments s ON s.id = p.segment WHERE p.namespace = ? AND p.key IN ({marks})",
            (namespace, *keys),
        )
        return {row[0]: PageRow(*row) for row in rows}

    def _drop_unfinished(self) -> None:
        """Forget reservations of processes that are gone."""
        rows = self.connection().execute("SELECT id, writer, created FROM segments WHERE writer IS NOT NULL").fetchall()
        for segment, writer, created in rows:
            if not is_alive(writer, created + LEASE_SECONDS):
                self.cancel(segment)

    def _drop_empty(self, connection: sqlite3.Connection) -> list[str]:
        rows = connection.execute(
            "DELETE FROM segments WHERE writer IS NULL "
            "AND NOT EXISTS (SELECT 1 FROM pages WHERE segment = segments.id) RETURNING name"
        ).fetchall()
        return [name for (name,) in rows]


def _new_id(connection: sqlite3.Connection) -> int:
    return connection.execute("UPDATE numbers SET last = last + 1 RETURNING last").fetchone()[0]


def _has_page(connection: sqlite3.Connection, namespace: int, key: Key) -> bool:
    row = connection.execute("SELECT 1 FROM pages WHERE namespace = ? AND key = ?", (namespace, key)).fetchone()
    return row is not None


def _reprioritise(connection: sqlite3.Connection, segments: Sequence[int]) -> None:
    connection.executemany(
        "UPDATE segments SET priority = (SELECT value FROM clock) + frequency * seconds / num_bytes WHERE id = ?",
        [(segment,) for segment in segments],
    )

"""A SQLite file that several processes and threads share: connections and transactions.

Invariants:

* a statement reaches the file that has the name now, or raises :class:`IndexReplaced`;
* the file is its owner's alone; SQLite gives the files beside it the same mode;
* a transaction is all there or not at all.

Connections belong to threads (:mod:`sqlite3` wants it); every thread gets its own on first use, and all are closed by
``close``. So this is for a few threads that live as long as it does.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BUSY_SECONDS = 30.0  # while another process writes


_HINTS = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_BUSY: "another process is writing to it",
    sqlite3.SQLITE_IOERR: "the disk is full or failing",
    sqlite3.SQLITE_CANTOPEN: "the disk is full or read-only, or the folder is not this user's to write to",
    sqlite3.SQLITE_READONLY: "it is read-only",
}


class IndexReplaced(OSError):
    """The file, or what was asked for in it, is not the one that was opened: open it anew."""


class Database:
    """The file *path*, made if it is not there; ``None``: in memory, for one thread.

    Args:
        busy_seconds: how long a statement waits for another process that writes.

    Raises:
        OSError: it can be neither made nor looked at.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False, busy_seconds: float = BUSY_SECONDS) -> None:
        self._path = path
        self._mode = "ro&immutable=1" if read_only else "rw"
        self._busy_seconds = busy_seconds
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        if path is not None and not read_only:
            _make_private(path)
        self._identity = self._find_identity()

    def close(self) -> None:
        """Close all connections. Never raises."""
        for connection in self._connections:
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        self._connections.clear()
        self._local = threading.local()

    def check(self) -> None:
        """Read all of it.

        Raises:
            DatabaseError: it is damaged.
        """
        (found,) = self.connection().execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(str(found))

    def connection(self) -> sqlite3.Connection:
        """The calling thread's.

        Raises:
            IndexReplaced: the file is not there any more, or another one.
        """
        if self._find_identity() != self._identity:
            raise IndexReplaced(f"{self._path} was removed or replaced")
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                "file::memory:" if self._path is None else f"{self._path.absolute().as_uri()}?mode={self._mode}",
                uri=True,
                timeout=self._busy_seconds,
                isolation_level=None,
                check_same_thread=False,  # closed by whoever closes the database
            )
            self._connections.append(connection)
            connection.execute("PRAGMA foreign_keys = ON")
            if self._mode == "rw":
                _write_ahead(connection, self._busy_seconds)
                connection.execute("PRAGMA synchronous = NORMAL")
            self._local.connection = connection
        return connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing."""
        connection = self.connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # a full disk, for one, has ended it
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise

    def _find_identity(self) -> tuple[int, int] | None:
        """Which file has the name now."""
        with contextlib.suppress(OSError):
            if self._path is not None:
                stat = self._path.stat()
                return stat.st_dev, stat.st_ino
        return None


def explain(error: BaseException) -> str:
    """What *error*, of a disk or of SQLite, means for people."""
    if isinstance(error, sqlite3.Error):
        hint = _HINTS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        return f"its index says {str(error)!r}" + (f" ({hint})" if hint else "")
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__


def _make_private(path: Path) -> None:
    """Have *path* there, for its owner alone. What is there is not opened: closing it would end SQLite's locks."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _write_ahead(connection: sqlite3.Connection, seconds: float) -> None:
    """Switch to a write-ahead log; SQLite itself does not wait for others who make or leave the database just now."""
    patience = time.monotonic() + seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > patience:
                raise
            time.sleep(0.01)

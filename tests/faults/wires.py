"""Where faults get in: the calls by which the engine meets disk, database and clock, and the parts inside of it.

Everything is patched at the outside (``os``, ``sqlite3``, ``time``), so a trial does not care how the store is built.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Tripwire:
    """Counts the operations that could be hit; some of them are. Any thread may call."""

    def __init__(self, at: int, times: int) -> None:
        self._range = range(at, at + times)
        self._lock = threading.Lock()
        self._is_armed = False
        self._count = 0
        self.num_hit = 0

    def arm(self) -> None:
        """Count from now on."""
        self._is_armed = True

    def disarm(self) -> None:
        """Nothing is hit any more."""
        self._is_armed = False

    def is_hit(self) -> bool:
        """Whether this operation is one of those to fail."""
        if not self._is_armed:
            return False
        with self._lock:
            count, self._count = self._count, self._count + 1
            self.num_hit += count in self._range
            return count in self._range


def path_of(descriptor: int) -> str:
    """The file behind *descriptor*; empty if that cannot be told."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def on_reads(patch: pytest.MonkeyPatch, wanted: Callable[[str], bool], wire: Tripwire, effect: ReadEffect) -> None:
    """Reads of the files that are *wanted* meet *effect*."""
    original = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if not wanted(path_of(descriptor)) or not wire.is_hit():
            return original(descriptor, buffers, offset, *flags)
        return effect(lambda: original(descriptor, buffers, offset, *flags), buffers)

    patch.setattr(os, "preadv", preadv)


ReadEffect = Callable[[Callable[[], int], list[memoryview]], int]


def fails(code: int) -> ReadEffect:
    """The kernel says *code*."""

    def effect(read: Callable[[], int], buffers: list[memoryview]) -> int:
        raise OSError(code, os.strerror(code))

    return effect


def ends(read: Callable[[], int], buffers: list[memoryview]) -> int:
    """The file ends here."""
    return 0


def lies(read: Callable[[], int], buffers: list[memoryview]) -> int:
    """A bit comes back turned."""
    count = read()
    if count:
        buffers[0][count // 2] ^= 4
    return count


def on_writes(patch: pytest.MonkeyPatch, folder: Path | str, wire: Tripwire, act: Callable[[], None]) -> None:
    """Every call that changes something below *folder* is followed through with *act* first, when it is hit."""
    below = str(folder)

    def watch(name: str, path: Callable[..., str | None]) -> None:
        original = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            found = path(*args, **options)
            if found is not None and found.startswith(below) and wire.is_hit():
                act()
            return original(*args, **options)

        patch.setattr(os, name, call)

    def opened(path: Any, flags: int, *_: Any, **__: Any) -> str | None:
        return str(path) if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else None

    watch("write", lambda descriptor, *_: path_of(descriptor))
    watch("fsync", lambda descriptor, *_: path_of(descriptor))
    watch("replace", lambda source, target, **_: str(target))
    watch("mkdir", lambda path, *_, **__: str(path))
    watch("open", opened)


def no_space() -> None:
    """As on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    """As on a file system that was remounted after an error."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


DATABASE_ERRORS: dict[str, tuple[type[sqlite3.Error], int, str]] = {
    "busy": (sqlite3.OperationalError, sqlite3.SQLITE_BUSY, "database is locked"),
    "full": (sqlite3.OperationalError, sqlite3.SQLITE_FULL, "database or disk is full"),
    "io": (sqlite3.OperationalError, sqlite3.SQLITE_IOERR, "disk I/O error"),
    "corrupt": (sqlite3.DatabaseError, sqlite3.SQLITE_CORRUPT, "database disk image is malformed"),
    "gone": (sqlite3.OperationalError, sqlite3.SQLITE_CANTOPEN, "unable to open database file"),
}


def on_statements(patch: pytest.MonkeyPatch, wire: Tripwire, act: Callable[[], None]) -> None:
    """Statements of connections made from now on meet *act* when they are hit."""
    original = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, *args: Any) -> sqlite3.Cursor:
            if wire.is_hit():
                act()
            return super().execute(*args)

        def executemany(self, *args: Any) -> sqlite3.Cursor:
            if wire.is_hit():
                act()
            return super().executemany(*args)

    patch.setattr(sqlite3, "connect", lambda *args, **options: original(*args, factory=Connection, **options))


def database_fails(name: str) -> Callable[[], None]:
    """SQLite says so."""
    kind, code, text = DATABASE_ERRORS[name]

    def act() -> None:
        error = kind(text)
        error.sqlite_errorcode = code
        raise error

    return act


def on_swap(patch: pytest.MonkeyPatch, wire: Tripwire) -> None:
    """The file of suspended answers cannot be written, or read back."""
    original = tempfile.TemporaryFile

    class Failing:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            if wire.is_hit():
                no_space()
            return self._file.write(data)

        def readinto(self, data: Any) -> int:
            if wire.is_hit():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self._file.readinto(data)

    patch.setattr(tempfile, "TemporaryFile", lambda *args, **options: Failing(original(*args, **options)))


class Planted(RuntimeError):
    """An error that a trial put into a part of the engine."""


def on_calls(patch: pytest.MonkeyPatch, owner: object, name: str, wire: Tripwire, error: BaseException) -> None:
    """Calls of *owner*'s *name* raise *error* when they are hit."""
    original = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        if wire.is_hit():
            raise error
        return original(*args, **options)

    patch.setattr(owner, name, call)

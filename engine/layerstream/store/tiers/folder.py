"""The folder of a local store: what lies in it, who may use it, and room in it.

::

    folder/layerstream-kv.json      says what the folder is
    folder/index.sqlite             the index; made to agree with the files at every opening, so it may be lost
    folder/<namespace>/about.json   what the namespace stands for
    folder/<namespace>/*.kv         segments
    folder/*-layerstream-kv.json.tmp, folder/<namespace>/*.tmp
                                    files being written; swept away once their writer is gone

Invariants: a segment is removed only under an exclusive lock on its file, so nobody's pages go away under a reading
process; the sum of all segments keeps to the bound, reservations of all writers included; once the folder is open, a
file that is neither in the index nor being written is not there, whoever died when, so nothing escapes the bound or
``kv clear``; nothing is ever deleted from a folder that is not a store; all is its owner's alone; any number of
processes and threads may make the same folder a store at once, or die while they do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from layerstream.errors import KVStoreUnusable
from layerstream.hardware.files import TEMPORARY, write_whole, writer_of
from layerstream.hardware.machine import network_file_system
from layerstream.store.database import BUSY_SECONDS, explain
from layerstream.store.eviction import choose_victims
from layerstream.store.index import Index
from layerstream.store.segment import SUFFIX, DamagedSegment, Key, SegmentInfo, read_info
from layerstream.store.tiers.locks import locked_for_removal

logger = logging.getLogger(__name__)

MARKER = "layerstream-kv.json"
MARKER_TO_BE = f"-{MARKER}{TEMPORARY}"  # how its name ends while it is written
INDEX = "index.sqlite"
ABOUT = "about.json"
FORMAT = 1
PASSING = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EBUSY)
)
"""Errors that are the disk's or the machine's, not the choice of the folder."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the folder may hold, and how much of the disk must stay free."""

    max_bytes: int
    min_free_bytes: int


class StoreUnavailable(KVStoreUnusable):
    """A folder that could be a store, were its disk not full, failing, read-only or held by others just now."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a folder is used.

    Attributes:
        owner: who it is that takes leases; ``None``: somebody new.
        busy_seconds: how long to wait for another process that writes.
        is_suspect: something went wrong, so all of the index is checked.
        has_files_only: look at the files alone, which needs no room on the disk; what only the index knows is missing.
    """

    owner: str | None = None
    busy_seconds: float = BUSY_SECONDS
    is_suspect: bool = False
    has_files_only: bool = False


class StoreFolder:
    """A folder of segments and its index, for all namespaces.

    Raises:
        StoreUnavailable: it may be had at another time.
        KVStoreUnusable: says why, and what to do; nothing was changed.
    """

    def __init__(self, path: Path, access: Access = Access()) -> None:
        self.path = path
        self.has_files_only = access.has_files_only
        self._access = access
        try:
            _check(path)
            self.read_only = path.is_dir() and not os.access(path, os.W_OK)
            if not (self.read_only or access.has_files_only):
                _initialise(path)
            self.index = self._open_index()
            try:
                if not self.read_only:
                    self._sweep_temporaries()
                    self._reconcile()
            except BaseException:
                self.index.close()
                raise
        except KVStoreUnusable:
            raise
        except (OSError, sqlite3.Error) as error:
            raise StoreUnavailable(f"{path} cannot be used as a KV store: {explain(error)}") from error

    def close(self) -> None:
        """Close the index. Never raises."""
        self.index.close()

    def segment_path(self, namespace: str, name: str) -> Path:
        """Where a segment lies."""
        return self.path / namespace / name

    def total_bytes(self) -> int:
        """Of all segments."""
        return self.index.total_bytes()

    def make_room(self, num_bytes: int, bounds: Bounds, in_use: Sequence[int] = ()) -> bool:
        """Evict until *num_bytes* more keep to *bounds*; whether they do."""
        free = shutil.disk_usage(self.path).free
        excess = max(self.total_bytes() + num_bytes - bounds.max_bytes, num_bytes + bounds.min_free_bytes - free)
        if excess <= 0:
            return True
        if num_bytes > bounds.max_bytes:
            return False
        for segment in choose_victims(self.index.candidates(), excess, in_use):
            excess -= self.remove(segment)
            if excess <= 0:
                return True
        return False

    def remove(self, segment: int) -> int:
        """Delete *segment* unless a process reads it or another segment depends on it; the bytes that became free."""
        location = self.index.location(segment)
        if location is None:
            return 0
        path = self.segment_path(*location)
        with locked_for_removal(path) as is_mine:
            size = path.stat().st_size if is_mine and path.exists() else 0
            if is_mine and self.index.remove(segment, lambda: path.unlink(missing_ok=True)):
                return size
        return 0

    def forget(self, namespace: str, namespace_id: int, *keys: Key) -> None:
        """Drop pages *keys* with their descendants, and the files that hold none of the rest."""
        for name in self.index.drop_pages(namespace_id, keys):
            self.segment_path(namespace, name).unlink(missing_ok=True)

    def describe(self, namespace: str, about: dict) -> None:
        """Make the namespace's folder, and write down what it stands for."""
        folder = self.path / namespace
        if not (folder / ABOUT).exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            _write_json(folder / ABOUT, about)

    def _open_index(self) -> Index:
        access, path = self._access, self.path / INDEX
        if access.has_files_only:
            return Index(None)
        try:
            return self._try_index(path)
        except sqlite3.DatabaseError as error:
            if self.read_only or isinstance(error, sqlite3.OperationalError):
                raise
            logger.warning("%s is damaged (%s): rebuilding it from the segments", path, error)
            _unlink_index(path)  # not kept: it has questions in it
            return self._try_index(path)

    def _try_index(self, path: Path) -> Index:
        access = self._access
        index = Index(path, read_only=self.read_only, owner=access.owner, busy_seconds=access.busy_seconds)
        try:
            index.check() if access.is_suspect else index.total_bytes()
        except BaseException:
            index.close()
            raise
        return index

    def _reconcile(self) -> None:
        """Have the index know exactly the segments that are there."""
        known = self.index.namespaces()
        folders = {path.parent.name for pattern in (ABOUT, f"*{SUFFIX}") for path in self.path.glob(f"*/{pattern}")}
        for namespace in sorted({*known, *folders}):
            paths = {
                path.name: path for path in (self.path / namespace).glob(f"*{SUFFIX}")
            }  # before the index is asked
            number = self.index.namespace_id(namespace) if namespace in known else None
            entered = {} if number is None else self.index.names(number)
            strays = [path for name, path in sorted(paths.items()) if name not in entered]
            if number is None:
                number = self.index.namespace_id(namespace, _read_about(self.path / namespace / ABOUT))
            assert number is not None
            if strays:
                self._adopt(namespace, number, strays)
            rows = self.index.names(number).items()
            missing = [(name, segment) for name, (segment, is_whole) in rows if is_whole and name not in paths]
            gone = [segment for name, segment in missing if not self.segment_path(namespace, name).exists()]
            if gone:
                self.forget(namespace, number, *(key for segment in gone for key in self.index.keys_of(segment)))

    def _adopt(self, namespace: str, number: int, paths: Sequence[Path]) -> None:
        """Enter those segments of *paths* that are whole, parents first; the others can be of no use."""
        found: list[tuple[SegmentInfo, int]] = []
        useless = []
        for path in paths:
            try:
                info = read_info(path)
                if info.namespace != namespace or info.name != path.name:
                    raise DamagedSegment(f"{path} is not what its name says")
                found.append((info, path.stat().st_size))
            except FileNotFoundError:
                continue  # evicted just now
            except DamagedSegment as error:
                logger.warning("a stored prefix is dropped: %s", error)
                useless.append(path)
        useless += [self.segment_path(namespace, info.name) for info, _ in self.index.add_segments(number, found)]
        for path in useless:
            with locked_for_removal(path) as is_mine:
                if is_mine:
                    path.unlink(missing_ok=True)
        logger.info("%d segments of %s are known again", len(paths) - len(useless), namespace)

    def remove_index(self) -> None:
        """Nothing is stored here: forget what only the index knows as well. Whoever has it open opens a new one."""
        self.index.close()
        _unlink_index(self.path / INDEX)

    def _sweep_temporaries(self) -> None:
        for path in (*self.path.glob(f"*{MARKER_TO_BE}"), *self.path.glob(f"*/*{TEMPORARY}")):
            pid = writer_of(path)
            with contextlib.suppress(OSError):
                is_old = time.time() - path.stat().st_mtime > 24 * 3600
                if is_old or (pid is not None and not psutil.pid_exists(pid)):
                    path.unlink()


def _unlink_index(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _check(path: Path) -> None:
    """Refuse what cannot or must not be a store, before anything is written."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
    if (kind := network_file_system(existing)) is not None:
        raise KVStoreUnusable(
            f"{path} is on a network file system ({kind}), where the index's locks cannot be relied on: pass a folder "
            "on a local disk as kv_store, or None for no store"
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise KVStoreUnusable(f"{path} is not a folder; pass a folder as kv_store, or None for no store")
    entries = {entry.name for entry in path.iterdir()}
    others = sorted(name for name in entries if not name.endswith(MARKER_TO_BE))
    if others and not any((path / name).exists() for name in (MARKER, INDEX)):  # in this order: it may just be made
        raise KVStoreUnusable(
            f"{path} holds other things ({', '.join(others[:3])}) and no KV store; pass an empty or a new "
            "folder as kv_store"
        )
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid != os.getuid():
            raise KVStoreUnusable(
                f"{path} belongs to user {status.st_uid}, this process to {os.getuid()}: KV can be turned back into "
                "text, so a store is used by its owner alone; pass another folder as kv_store"
            )
        if entries and stat.S_IMODE(status.st_mode) & 0o077:
            raise KVStoreUnusable(
                f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):o}), and KV can be turned back "
                f"into text: chmod 700 {path}"
            )
    _check_format(path)


def _check_format(path: Path) -> None:
    try:
        found = json.loads((path / MARKER).read_text("utf-8"))["format"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KVStoreUnusable(f"{path / MARKER} cannot be understood ({error}); pass another folder") from error
    if not isinstance(found, int) or found > FORMAT:
        raise KVStoreUnusable(
            f"{path} was written by a newer version of LayerStream (format {found}, this one knows {FORMAT}): update "
            "layerstream, or pass another folder as kv_store"
        )


def _initialise(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not any(path.iterdir()):
            path.chmod(0o700)
        if not (path / MARKER).exists():
            _write_json(path / MARKER, {"format": FORMAT, "what": "LayerStream's KV store: made by it, safe to remove"})
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise KVStoreUnusable(f"{path} cannot be made a KV store: {error}; pass another folder as kv_store") from error


def _read_about(path: Path) -> str:
    """The description at *path*; empty if there is none that can be understood."""
    try:
        text = path.read_text("utf-8")
        return text if isinstance(json.loads(text), dict) else "{}"
    except (FileNotFoundError, ValueError, RecursionError):
        return "{}"


def _write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1, sort_keys=True), is_private=True)

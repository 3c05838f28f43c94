"""The folder of a local store: what lies in it, who may use it, and room in it.

::

    folder/layerstream-kv.json      says what the folder is
    folder/index.sqlite             the index; rebuilt from the segments' footers if it is lost or damaged
    folder/<namespace>/about.json   what the namespace stands for
    folder/<namespace>/*.kv         segments
    folder/*-layerstream-kv.json.tmp, folder/<namespace>/*.tmp
                                    files being written; swept away once their writer is gone

Invariants: a segment is removed only under an exclusive lock on its file, so nobody's pages go away under a reading
process; the sum of all segments keeps to the bound, reservations of all writers included; nothing is ever deleted from
a folder that is not a store; any number of processes and threads may make the same folder a store at once, or die
while they do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from layerstream.errors import KVStoreUnusable
from layerstream.files import TEMPORARY, write_whole, writer_of
from layerstream.kv.eviction import choose_victims
from layerstream.kv.index import Index
from layerstream.kv.segment import SUFFIX, DamagedSegment, Key, SegmentInfo, read_info

logger = logging.getLogger(__name__)

MARKER = "layerstream-kv.json"
MARKER_TO_BE = f"-{MARKER}{TEMPORARY}"  # how its name ends while it is written
INDEX = "index.sqlite"
ABOUT = "about.json"
FORMAT = 1
REMOTE_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb smb2 smb3 smbfs 9p afpfs webdav fuse.sshfs fuse.s3fs fuse.gcsfuse".split()
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the folder may hold, and how much of the disk must stay free."""

    max_bytes: int
    min_free_bytes: int


class StoreFolder:
    """A folder of segments and its index, for all namespaces.

    Raises:
        KVStoreUnusable: says why, and what to do; nothing was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check(path)
        self.read_only = path.is_dir() and not os.access(path, os.W_OK)
        if not self.read_only:
            _initialise(path)
        self.index = self._open_index()
        if not self.read_only:
            self._sweep_temporaries()

    def close(self) -> None:
        """Close the index."""
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
        with _locked_for_removal(path) as is_mine:
            if not is_mine or not self.index.remove(segment):
                return 0
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                return size
        return 0

    def forget(self, namespace: str, namespace_id: int, key: Key) -> None:
        """Drop page *key* with its descendants, and the files that hold none of the rest."""
        for name in self.index.drop_pages(namespace_id, key):
            self.segment_path(namespace, name).unlink(missing_ok=True)

    def describe(self, namespace: str, about: dict) -> None:
        """Make the namespace's folder, and write down what it stands for."""
        folder = self.path / namespace
        if not (folder / ABOUT).exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            _write_json(folder / ABOUT, about)

    def _open_index(self) -> Index:
        path = self.path / INDEX
        is_new = not path.exists()
        try:
            index = Index(path, read_only=self.read_only)
            if not is_new:
                index.total_bytes()
        except sqlite3.DatabaseError as error:
            if self.read_only or isinstance(error, sqlite3.OperationalError):
                raise KVStoreUnusable(
                    f"{path}: {error}; if nothing else uses the KV store, remove this file: it is rebuilt from the "
                    "segments"
                ) from error
            logger.warning("%s is damaged (%s): rebuilding it from the segments", path, error)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{path}{suffix}", f"{path}{suffix}.damaged")
            index, is_new = Index(path), True
        if is_new and not self.read_only:
            self._rebuild(index)
        return index

    def _rebuild(self, index: Index) -> None:
        """Enter every whole segment that lies in the folder, parents first."""
        for about in sorted(self.path.glob(f"*/{ABOUT}")):
            namespace = about.parent.name
            found: list[tuple[SegmentInfo, int]] = []
            for path in sorted(about.parent.glob(f"*{SUFFIX}")):
                try:
                    info = read_info(path)
                except (DamagedSegment, OSError) as error:
                    logger.warning("left out of the index: %s", error)
                    continue
                if info.namespace == namespace and info.name == path.name:
                    found.append((info, path.stat().st_size))
            number = index.namespace_id(namespace, about.read_text("utf-8"))
            assert number is not None
            index.add_segments(number, found)

    def _sweep_temporaries(self) -> None:
        for path in (*self.path.glob(f"*{MARKER_TO_BE}"), *self.path.glob(f"*/*{TEMPORARY}")):
            pid = writer_of(path)
            with contextlib.suppress(OSError):
                is_old = time.time() - path.stat().st_mtime > 24 * 3600
                if is_old or (pid is not None and not psutil.pid_exists(pid)):
                    path.unlink()


def _check(path: Path) -> None:
    """Refuse what cannot or must not be a store, before anything is written."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    kind = _file_system(existing)
    if kind in REMOTE_FILE_SYSTEMS:
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
        raise KVStoreUnusable(f"{path} cannot be made a KV store: {error}; pass another folder as kv_store") from error


def _write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1, sort_keys=True))


def _file_system(path: Path) -> str:
    """The type of the file system that *path* is on, if it can be told."""
    best, kind = "", ""
    with contextlib.suppress(OSError, RuntimeError):
        for part in psutil.disk_partitions(all=True):
            inside = path == Path(part.mountpoint) or Path(part.mountpoint) in path.parents
            if inside and len(part.mountpoint) >= len(best):
                best, kind = part.mountpoint, part.fstype
    return kind.lower()


@contextlib.contextmanager
def _locked_for_removal(path: Path) -> Iterator[bool]:
    """Whether nobody reads *path*, while inside; a file that is not there is read by nobody."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)

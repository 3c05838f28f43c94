"""Pages in segments in a folder, with an index beside them: the tier that is on by default.

::

    folder/layerstream-kv.json      says what the folder is
    folder/index.sqlite             the index; rebuilt from the segments' footers if it is lost or damaged
    folder/<namespace>/about.json   what the namespace stands for
    folder/<namespace>/*.kv         segments
    folder/<namespace>/*.tmp        segments being written; swept away once their writer is gone

Invariants: a segment is removed only under an exclusive lock on its file, and read under a shared one, so nobody's
pages go away under a reading process; the sum of all segments keeps to the bound, reservations of all writers
included; nothing is ever deleted from a folder that is not a store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from layerstream.errors import KVStoreUnusable
from layerstream.kv.eviction import choose_victims
from layerstream.kv.index import Index, PageRow
from layerstream.kv.segment import (
    SUFFIX,
    TEMPORARY,
    DamagedSegment,
    Key,
    SegmentInfo,
    SegmentWriter,
    padded,
    read_info,
)
from layerstream.kv.tiers.base import Consume, Done, NewPages, PageFacts, StoredRun
from layerstream.streaming.reader import DirectReader
from layerstream.streaming.unit import REQUEST_BYTES, ReadRequest

logger = logging.getLogger(__name__)

MARKER = "layerstream-kv.json"
INDEX = "index.sqlite"
ABOUT = "about.json"
FORMAT = 1
KV_PRIORITY = 0  # before weights: a layer's KV is wanted as soon as its weights are
FOOTER_ALLOWANCE = 64 * 1024
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
            while waiting := [item for item in found if not index.add_segment(number, *item)]:
                if len(waiting) == len(found):
                    break  # their parents are gone
                found = waiting

    def _sweep_temporaries(self) -> None:
        for path in self.path.glob(f"*/*{TEMPORARY}"):
            pid = path.name.split("-")[0]
            with contextlib.suppress(OSError):
                is_old = time.time() - path.stat().st_mtime > 24 * 3600
                if is_old or (pid.isdigit() and not psutil.pid_exists(int(pid))):
                    path.unlink()


class LocalTier:
    """One namespace of a :class:`StoreFolder`; a :class:`~layerstream.kv.tiers.base.Tier`."""

    def __init__(self, folder: StoreFolder, namespace: str, about: dict, bounds: Bounds, reader: DirectReader) -> None:
        self.folder = folder
        self.namespace = namespace
        self._bounds = bounds
        self._reader = reader
        self._index = folder.index
        if not folder.read_only:
            folder.describe(namespace, about)
        self._namespace_id = self._index.namespace_id(namespace, json.dumps(about, sort_keys=True))
        self._lock = threading.Lock()
        self._open: dict[int, _OpenSegment] = {}
        self._used: list[int] = []
        self._has_claims = False

    def contains(self, keys: Sequence[Key]) -> list[PageFacts]:
        """The longest prefix of *keys* that is here."""
        return [PageFacts(row.key, row.num_bytes, row.seconds) for row in self._find(keys)]

    def open(self, keys: Sequence[Key]) -> list[StoredRun]:
        """Runs of *keys*; shorter if a segment has gone or is damaged."""
        runs: list[StoredRun] = []
        for rows in _runs(self._find(keys)):
            segment = self._acquire(rows[0])
            if segment is None:
                break
            slots = range(rows[0].slot, rows[-1].slot + 1)
            if tuple(row.key for row in rows) != segment.info.keys[slots.start : slots.stop]:
                self.drop(rows[0].key)
                self._release(segment)
                break
            runs.append(_LocalRun(self, segment, slots))
        return runs

    def put(self, pages: NewPages) -> int:
        """Write *pages* as one segment."""
        if self.folder.read_only or self._namespace_id is None:
            return 0
        wanted = pages.num_bytes + FOOTER_ALLOWANCE
        with self._lock:
            in_use = list(self._open)
        if not self.folder.make_room(wanted, self._bounds, in_use):
            return 0
        info = _info_of(self.namespace, pages)
        segment = self._index.reserve(self._namespace_id, info.name, wanted)
        if segment is None:
            return 0
        try:
            with SegmentWriter(self.folder.path / self.namespace) as writer:
                for layer in range(len(pages.shapes)):
                    writer.write_layer(pages.encode_layer(layer))
                info = _info_of(self.namespace, pages, writer)
                num_bytes = writer.commit(info)
        except BaseException:
            self._index.cancel(segment)
            raise
        if not self._index.add_segment(self._namespace_id, info, num_bytes, pinned=pages.pinned):
            self._index.cancel(segment)
            self.folder.segment_path(self.namespace, info.name).unlink(missing_ok=True)
            return 0
        return num_bytes

    def room(self) -> tuple[int, int]:
        """Bytes in the folder, and how many there may be."""
        return self.folder.total_bytes(), self._bounds.max_bytes

    def pin(self, keys: Sequence[Key]) -> None:
        """Keep *keys* from eviction."""
        if not self.folder.read_only and self._namespace_id is not None:
            self._index.pin(self._namespace_id, keys)

    def drop(self, key: Key) -> None:
        """Forget *key* and its descendants."""
        if not self.folder.read_only and self._namespace_id is not None:
            self.folder.forget(self.namespace, self._namespace_id, key)

    def claim(self, keys: Sequence[Key]) -> bool:
        """Lease *keys* to this process."""
        if self.folder.read_only or self._namespace_id is None:
            return True
        self._has_claims = True
        return self._index.claim(self._namespace_id, keys)

    def unclaim(self, keys: Sequence[Key]) -> None:
        """End the leases of *keys*."""
        if not self.folder.read_only and self._namespace_id is not None:
            self._index.unclaim(self._namespace_id, keys)

    def tick(self) -> None:
        """Renew leases, write down which segments were used."""
        if self.folder.read_only:
            return
        if self._has_claims:
            self._index.renew()
        with self._lock:
            used, self._used = self._used, []
        if used:
            self._index.touch(used)

    def close(self) -> None:
        """Let go of all segments."""
        self.tick()
        with self._lock:
            segments = list(self._open.values())
            self._open.clear()
        for segment in segments:
            segment.close(self._reader)

    def _find(self, keys: Sequence[Key]) -> list[PageRow]:
        return [] if self._namespace_id is None else self._index.find(self._namespace_id, keys)

    def _acquire(self, row: PageRow) -> _OpenSegment | None:
        with self._lock:
            segment = self._open.get(row.segment)
            if segment is not None:
                segment.num_users += 1
                return segment
        path = self.folder.segment_path(self.namespace, row.name)
        try:
            segment = _OpenSegment.open(row.segment, path)
            if segment.info.namespace != self.namespace:
                segment.close(self._reader)
                raise DamagedSegment(f"{path}: it belongs to another namespace")
        except (DamagedSegment, OSError) as error:
            logger.warning("a stored prefix is computed again: %s", error)
            self.drop(row.key)
            return None
        with self._lock:
            self._open[row.segment] = segment
            self._used.append(row.segment)
        return segment

    def _release(self, segment: _OpenSegment) -> None:
        with self._lock:
            segment.num_users -= 1
            is_last = not segment.num_users and self._open.pop(segment.number, None) is not None
        if is_last:
            segment.close(self._reader)


@dataclass(eq=False, slots=True)
class _OpenSegment:
    """A segment held under a shared lock."""

    number: int
    path: Path
    info: SegmentInfo
    descriptor: int
    num_users: int = 1

    @classmethod
    def open(cls, number: int, path: Path) -> _OpenSegment:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            _lock_shared(descriptor)
            if not path.exists():
                raise FileNotFoundError(f"{path}: it was evicted just now")
            return cls(number, path, read_info(path), descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self, reader: DirectReader) -> None:
        reader.forget(self.path)
        os.close(self.descriptor)


class _LocalRun:
    """Pages of an open segment."""

    def __init__(self, tier: LocalTier, segment: _OpenSegment, slots: range) -> None:
        self.slots = slots
        self._tier = tier
        self._segment: _OpenSegment | None = segment
        self._info = segment.info

    @property
    def info(self) -> SegmentInfo:
        return self._info

    def read(self, layer: int, slots: range, consume: Consume, done: Done) -> None:
        assert self._segment is not None, "read after close"
        size = padded(self._info.encoded_bytes[layer])
        offset = self._info.layer_offsets[layer] + slots.start * size
        request = ReadRequest(self._segment.path, offset, len(slots) * size, len(slots) * size, destination=None)
        self._tier._reader.submit(request, memoryview(b""), 0, done, priority=KV_PRIORITY, consume=consume)

    def close(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            self._tier._release(segment)


def pages_per_read(info: SegmentInfo, layer: int) -> int:
    """Page-layers that one read brings."""
    return max(1, REQUEST_BYTES // padded(info.encoded_bytes[layer]))


def _runs(rows: Sequence[PageRow]) -> Iterator[list[PageRow]]:
    """Neighbouring pages of one segment."""
    run: list[PageRow] = []
    for row in rows:
        if run and (row.segment != run[-1].segment or row.slot != run[-1].slot + 1):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _info_of(namespace: str, pages: NewPages, writer: SegmentWriter | None = None) -> SegmentInfo:
    return SegmentInfo(
        namespace=namespace,
        keys=pages.keys,
        parent=pages.parent,
        page_tokens=pages.page_tokens,
        codec=pages.codec,
        encoded_bytes=tuple(writer.encoded_bytes) if writer else (),
        shapes=pages.shapes,
        checksums=tuple(writer.checksums) if writer else (),
        seconds=pages.seconds,
    )


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
    if entries and not entries & {MARKER, INDEX}:
        raise KVStoreUnusable(
            f"{path} holds other things ({', '.join(sorted(entries)[:3])}) and no KV store; pass an empty or a new "
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
    temporary = path.with_suffix(f".{os.getpid()}{TEMPORARY}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True), "utf-8")
    os.replace(temporary, path)


def _file_system(path: Path) -> str:
    """The type of the file system that *path* is on, if it can be told."""
    best, kind = "", ""
    with contextlib.suppress(OSError, RuntimeError):
        for part in psutil.disk_partitions(all=True):
            inside = path == Path(part.mountpoint) or Path(part.mountpoint) in path.parents
            if inside and len(part.mountpoint) >= len(best):
                best, kind = part.mountpoint, part.fstype
    return kind.lower()


def _lock_shared(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        return  # Windows: an open file cannot be removed anyway
    fcntl.flock(descriptor, fcntl.LOCK_SH)


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

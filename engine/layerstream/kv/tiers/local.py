"""Pages in segments in a folder, with an index beside them: the tier that is on by default.

Invariants: a segment is read under a shared lock on its file, so no process evicts what another one reads; its bytes
are reserved in the index before they are written, so all writers together keep to the bound.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerstream.kv.answers import Answers, RememberedAnswer
from layerstream.kv.index import PageRow
from layerstream.kv.segment import DamagedSegment, Key, SegmentInfo, SegmentWriter, padded, read_info
from layerstream.kv.tiers.base import Consume, Done, NewPages, PageFacts, StoredRun
from layerstream.kv.tiers.folder import Bounds, StoreFolder
from layerstream.streaming.reader import DirectReader
from layerstream.streaming.unit import ReadRequest

logger = logging.getLogger(__name__)

FOOTER_ALLOWANCE = 64 * 1024
KV_PRIORITY = 0  # before weights: a layer's KV is wanted as soon as its weights are


class LocalTier:
    """One namespace of a :class:`StoreFolder`; a :class:`~layerstream.kv.tiers.base.Tier`."""

    def __init__(self, folder: StoreFolder, namespace: str, about: dict, bounds: Bounds, reader: DirectReader) -> None:
        self.folder = folder
        self.namespace = namespace
        self._bounds = bounds
        self._reader = reader
        self._index = folder.index
        self._answers = Answers(folder.index)
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

    def remember(self, item: RememberedAnswer) -> bool:
        """Keep *item*, if its page is here."""
        if self.folder.read_only or self._namespace_id is None:
            return False
        return self._answers.remember(self._namespace_id, item)

    def recall(self, prefixes: Sequence[Key]) -> list[list[int]]:
        """What hangs on *prefixes*."""
        return [] if self._namespace_id is None else self._answers.recall(self._namespace_id, prefixes)

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


def _lock_shared(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        return  # Windows: an open file cannot be removed anyway
    fcntl.flock(descriptor, fcntl.LOCK_SH)

"""The segments that are being read, and where the pages are that may be.

Any thread; no index is asked, so nothing here waits for another process. Invariants: a segment is read under a shared
lock on its file, so no process evicts what another one reads; what a lock was taken for is the segment that is meant,
by its footer; the last one who reads a segment closes it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerstream.hardware.reader import DirectReader, ReadRequest
from layerstream.store.index import PageRow
from layerstream.store.segment import DamagedSegment, Key, SegmentInfo, padded, read_info
from layerstream.store.tiers.base import Consume, Done, StoredRun
from layerstream.store.tiers.locks import open_locked

logger = logging.getLogger(__name__)

KV_PRIORITY = 0  # before weights: a layer's KV is wanted as soon as its weights are
MOST_KNOWN = 2**17  # pages whose place is remembered: 20 MB


class OpenSegments:
    """Pages of one namespace, in the files of *folder*."""

    def __init__(self, folder: Path, namespace: str, reader: DirectReader) -> None:
        self._folder = folder
        self._namespace = namespace
        self._reader = reader
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, PageRow] = OrderedDict()
        self._open: dict[str, OpenSegment] = {}
        self._used: list[int] = []

    def learn(self, keys: Sequence[Key], rows: Iterable[PageRow]) -> None:
        """Of *keys*, those of *rows* are there, the others are not."""
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
            for row in rows:
                self._known[row.key] = row
            while len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)

    def open(self, keys: Sequence[Key]) -> list[StoredRun]:
        """Runs that together are *keys*, or as many from the first on as are known and still there."""
        runs: list[StoredRun] = []
        for rows in _runs(self._rows(keys)):
            segment = self._acquire(rows[0])
            if segment is None:
                break
            slots = range(rows[0].slot, rows[-1].slot + 1)
            if tuple(row.key for row in rows) != segment.info.keys[slots.start : slots.stop]:
                self._release(segment)
                break
            runs.append(OpenRun(self, segment, slots))
        return runs

    def numbers(self) -> list[int]:
        """The segments that are open."""
        with self._lock:
            return [segment.number for segment in self._open.values()]

    def take_used(self) -> list[int]:
        """The segments that were opened since this was asked last."""
        with self._lock:
            used, self._used = self._used, []
            return used

    def _rows(self, keys: Sequence[Key]) -> list[PageRow]:
        found: list[PageRow] = []
        with self._lock:
            for key in keys:
                row = self._known.get(key)
                if row is None:
                    break
                found.append(row)
        return found

    def _acquire(self, row: PageRow) -> OpenSegment | None:
        with self._lock:
            segment = self._open.get(row.name)
            if segment is not None:
                segment.num_users += 1
                return segment
        path = self._folder / self._namespace / row.name
        try:
            segment = OpenSegment.open(row.segment, path, self._namespace)
        except (DamagedSegment, OSError) as error:
            logger.warning("a stored prefix is computed again: %s", error)
            return None
        with self._lock:
            other = self._open.setdefault(row.name, segment)
            other.num_users += other is not segment
            self._used.append(row.segment)
        if other is not segment:  # another thread was faster
            segment.close()
        return other

    def _release(self, segment: OpenSegment) -> None:
        with self._lock:
            segment.num_users -= 1
            is_last = not segment.num_users and self._open.pop(segment.path.name, None) is not None
        if is_last:
            self._reader.forget(segment.path)
            segment.close()

    def read(self, segment: OpenSegment, offset: int, size: int, consume: Consume, done: Done) -> None:
        """Bring *size* bytes of *segment* to *consume*, on a reader's thread."""
        request = ReadRequest(segment.path, offset, size, size, destination=None)
        self._reader.submit(request, memoryview(b""), 0, done, priority=KV_PRIORITY, consume=consume)


@dataclass(eq=False, slots=True)
class OpenSegment:
    """A segment held under a shared lock."""

    number: int
    path: Path
    info: SegmentInfo
    descriptor: int
    num_users: int = 1

    @classmethod
    def open(cls, number: int, path: Path, namespace: str) -> OpenSegment:
        """Take the lock, read the footer.

        Raises:
            DamagedSegment: it is not what the name says. OSError: it cannot be read, or is being removed.
        """
        descriptor = open_locked(path)
        try:
            info = read_info(path)
            if info.namespace != namespace:
                raise DamagedSegment(f"{path}: it belongs to another namespace")
            return cls(number, path, info, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Let others remove it."""
        os.close(self.descriptor)


class OpenRun:
    """Pages of an open segment; a :class:`~layerstream.store.tiers.base.StoredRun`."""

    def __init__(self, segments: OpenSegments, segment: OpenSegment, slots: range) -> None:
        self.slots = slots
        self.info = segment.info
        self._segments = segments
        self._segment: OpenSegment | None = segment

    def read(self, layer: int, slots: range, consume: Consume, done: Done) -> None:
        """Bring page-layers to *consume*."""
        assert self._segment is not None, "read after close"
        size = padded(self.info.encoded_bytes[layer])
        offset = self.info.layer_offsets[layer] + slots.start * size
        self._segments.read(self._segment, offset, len(slots) * size, consume, done)

    def close(self) -> None:
        """No more reads. Idempotent."""
        segment, self._segment = self._segment, None
        if segment is not None:
            self._segments._release(segment)


def _runs(rows: Sequence[PageRow]) -> Iterator[list[PageRow]]:
    """Neighbouring pages of one segment."""
    run: list[PageRow] = []
    for row in rows:
        if run and (row.name != run[-1].name or row.slot != run[-1].slot + 1):
            yield run
            run = []
        run.append(row)
    if run:
        yield run

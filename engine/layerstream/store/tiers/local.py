"""Pages in segments in a folder, with an index beside them: the tier that is on by default.

Invariants: the bytes of a segment are reserved in the index before they are written, so all writers together keep to
the bound; a file is whole before the index knows its pages. What is being read, and how it is kept from eviction, is
in :mod:`layerstream.store.tiers.opened`.

Errors of the folder and its index are raised (``OSError``, ``sqlite3.Error``), but for those of ``open`` and ``close``.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection, Sequence

from layerstream.hardware.reader import DirectReader
from layerstream.store.answers import Answers, RememberedAnswer
from layerstream.store.index import PageRow
from layerstream.store.retrievals import Retrieval, StoredRetrievals
from layerstream.store.segment import Key, SegmentInfo, SegmentWriter
from layerstream.store.tiers.base import NewPages, PageFacts, StoredRun
from layerstream.store.tiers.folder import Bounds, StoreFolder
from layerstream.store.tiers.opened import OpenSegments

FOOTER_ALLOWANCE = 64 * 1024


class LocalTier:
    """One namespace of a :class:`StoreFolder`, which it closes; a :class:`~layerstream.store.tiers.base.Tier`.

    Args:
        opened: what an earlier tier of the same namespace had open.
    """

    def __init__(
        self,
        folder: StoreFolder,
        namespace: str,
        about: dict,
        bounds: Bounds,
        reader: DirectReader,
        opened: OpenSegments | None = None,
    ) -> None:
        self.folder = folder
        self.namespace = namespace
        self.opened = opened or OpenSegments(folder.path, namespace, reader)
        self._bounds = bounds
        self._index = folder.index
        self._answers = Answers(folder.index)
        self._retrievals = StoredRetrievals(folder.index)
        if not folder.read_only:
            folder.describe(namespace, about)
        number = self._index.namespace_id(namespace, json.dumps(about, sort_keys=True))
        self._is_there = number is not None
        self._can_write = self._is_there and not folder.read_only
        self._number = number or 0
        self._has_claims = False

    def contains(self, keys: Sequence[Key]) -> list[PageFacts]:
        """The longest prefix of *keys* that is here."""
        return self._learn(keys, self._index.find(self._number, keys) if self._is_there else [])

    def any_of(self, keys: Sequence[Key]) -> list[PageFacts]:
        """Those of *keys* that are here."""
        return self._learn(keys, self._index.any_of(self._number, keys) if self._is_there else [])

    def open(self, keys: Sequence[Key]) -> list[StoredRun]:
        """Runs of *keys*, as far as they were found or written here, and are still there."""
        return self.opened.open(keys)

    def put(self, pages: NewPages) -> int:
        """Write *pages* as one segment."""
        if not self._can_write:
            return 0
        self._index.check_namespace(self._number, self.namespace)
        wanted = pages.num_bytes + FOOTER_ALLOWANCE
        continued = [row.segment for row in self._index.any_of(self._number, [pages.parent])]
        if not self.folder.make_room(wanted, self._bounds, [*self.opened.numbers(), *continued]):
            return 0
        info = _info_of(self.namespace, pages)
        segment = self._index.reserve(self._number, info.name, wanted)
        if segment is None:
            return 0
        is_entered = False
        try:
            with SegmentWriter(self.folder.path / self.namespace) as writer:
                for layer in range(len(pages.shapes)):
                    writer.write_layer(pages.encode_layer(layer))
                info = _info_of(self.namespace, pages, writer)
                num_bytes = writer.commit(info)
            is_entered = self._index.add_segment(self._number, info, num_bytes, pinned=pages.pinned)
        finally:
            if not is_entered:
                self._withdraw(segment, info.name)
        if not is_entered:
            return 0
        each = num_bytes // len(pages.keys), pages.seconds / len(pages.keys)
        rows = [PageRow(key, segment, info.name, slot, *each) for slot, key in enumerate(pages.keys)]
        self.opened.learn(pages.keys, rows)
        return num_bytes

    def room(self) -> tuple[int, int]:
        """Bytes in the folder, and how many there may be."""
        return self.folder.total_bytes(), self._bounds.max_bytes

    def pin(self, keys: Sequence[Key]) -> None:
        """Keep *keys* from eviction."""
        if self._can_write:
            self._index.pin(self._number, keys)

    def drop(self, key: Key) -> None:
        """Forget *key* and its descendants."""
        self.opened.learn([key], [])
        if self._can_write:
            self.folder.forget(self.namespace, self._number, key)

    def claim(self, keys: Sequence[Key]) -> bool:
        """Lease *keys* to this process."""
        if not self._can_write:
            return True
        self._index.check_namespace(self._number, self.namespace)
        self._has_claims = True
        return self._index.leases.claim(self._number, keys)

    def announce(self, keys: Sequence[Key]) -> None:
        """Lease *keys* to this process for a moment."""
        if self._can_write:
            self._index.leases.announce(self._number, keys)

    def is_announced(self, keys: Collection[Key]) -> bool:
        """Whether one of *keys* is leased to another process."""
        return self._can_write and self._index.leases.is_announced(self._number, keys)

    def unclaim(self, keys: Sequence[Key]) -> None:
        """End the leases of *keys*."""
        if self._can_write:
            self._index.leases.unclaim(self._number, keys)

    def remember(self, item: RememberedAnswer) -> bool:
        """Keep *item*, if its page is here."""
        return self._can_write and self._answers.remember(self._number, self.namespace, item)

    def recall(self, prefixes: Sequence[Key]) -> list[list[int]]:
        """What hangs on *prefixes*."""
        return self._answers.recall(self._number, self.namespace, prefixes) if self._is_there else []

    def note_retrieved(self, item: Retrieval) -> None:
        """Count *item*."""
        if self._can_write:
            self._retrievals.note(item)

    def retrieved(self, item: Retrieval) -> list[float]:
        """How often each document of *item* was retrieved, for whatever model."""
        return self._retrievals.counts(item)

    def tick(self) -> None:
        """Renew leases, write down which segments were used."""
        used = self.opened.take_used()
        if not self._can_write:
            return
        if self._has_claims:
            self._index.leases.renew()
        if used:
            self._index.touch(used)

    def close(self) -> None:
        """Write down what was used, close the index. Runs stay open until they are closed. Never raises."""
        with contextlib.suppress(sqlite3.Error, OSError):
            self.tick()
        self.folder.close()

    def _learn(self, keys: Sequence[Key], rows: Sequence[PageRow]) -> list[PageFacts]:
        """Of *keys*, those of *rows* are here and may be opened."""
        self.opened.learn(keys, rows)
        return [PageFacts(row.key, row.num_bytes, row.seconds) for row in rows]

    def _withdraw(self, segment: int, name: str) -> None:
        """Nothing came of the reservation *segment*, nor of a file that is written already."""
        with contextlib.suppress(sqlite3.Error, OSError):
            self._index.cancel(segment)
        with contextlib.suppress(OSError):
            self.folder.segment_path(self.namespace, name).unlink(missing_ok=True)


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

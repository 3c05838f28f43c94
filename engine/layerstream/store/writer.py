"""The thread that writes: pages, snapshots of recurrent layers and answers, behind the sweeps.

Invariants: a page or a snapshot is written after what it continues, or skipped where that is not stored; what a batch
is written from comes back exactly once, from ``collect…`` or ``give_back…``; while there is no tier batches wait. No
method raises an error of the tier.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from layerstream.kv.keys import snapshot_key
from layerstream.kv.stored import Published, PublishedState
from layerstream.store.answers import RememberedAnswer
from layerstream.store.connection import STORE_ERRORS, TierConnection
from layerstream.store.counters import StoreCounters
from layerstream.store.known import KnownKeys
from layerstream.store.segment import MAX_PAGES, Key
from layerstream.store.source import PageSource, snapshot_run
from layerstream.store.tiers.base import Tier
from layerstream.store.write_queue import Batch, WriteQueue

logger = logging.getLogger(__name__)

TICK_SECONDS = 3.0


class Writer:
    """Writes to the tier of *connection* what is published; nothing before ``start``.

    Args:
        pages, snapshots: what these are written from.
        is_current: whether the model's files are still those that the digests were taken of.
    """

    def __init__(
        self,
        connection: TierConnection,
        pages: PageSource,
        snapshots: PageSource,
        known: KnownKeys,
        counters: StoreCounters,
        is_current: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._pages = pages
        self._snapshots = snapshots
        self._known = known
        self._counters = counters
        self._is_current = is_current
        self._changed = threading.Condition()
        self._queue = WriteQueue()
        self._thread = threading.Thread(target=self._work, name="layerstream-kv-writer", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def publish(self, batch: Batch) -> None:
        """Write *batch*, after what was published before it."""
        if isinstance(item := batch.published, PublishedState):
            self._connection.post(lambda tier: tier.announce([snapshot_key(item.key)]))
        with self._changed:
            self._queue.batches.append(batch)
            self._changed.notify_all()
        self.give_up_hopeless()

    def remember(self, answer: RememberedAnswer) -> None:
        """Keep *answer*, after all that was published."""
        with self._changed:
            self._queue.answers.append(answer)
            self._changed.notify_all()

    def collect_frames(self) -> list[int]:
        """Frames whose pages were written, or will not be."""
        with self._changed:
            return self._queue.take_frames()

    def collect_slots(self) -> list[int]:
        """Slots whose states were written, or will not be."""
        with self._changed:
            return self._queue.take_slots()

    def give_back_frames(self) -> list[int]:
        """Frames of pages that nobody has begun to write and nobody waits for: those are not written."""
        gone = self._withdraw(lambda batch: isinstance(batch.published, Published) and not batch.is_spilled)
        return [page for batch in gone if isinstance(batch.published, Published) for page in batch.published.pages]

    def give_back_slots(self) -> list[int]:
        """Slots of states that nobody has begun to write: those are not written."""
        gone = self._withdraw(lambda batch: isinstance(batch.published, PublishedState))
        return [batch.published.slot for batch in gone if isinstance(batch.published, PublishedState)]

    def give_up_hopeless(self) -> None:
        """Whoever waits for pages to be stored is not kept waiting by a store that is off."""
        if self._connection.state in ("off", "unusable"):
            gone = self._withdraw(lambda batch: batch.is_spilled or self._connection.state == "unusable")
            with self._changed:
                for batch in gone:
                    self._queue.finish(batch)

    def tier_changed(self) -> None:
        """The tier is there, or not any more."""
        with self._changed:
            self._changed.notify_all()
        self.give_up_hopeless()

    def wait_until_open(self) -> None:
        """Return when the tier is there, or turned out not to be had."""
        with self._changed:
            while self._connection.state == "hashing" and self._thread.is_alive():
                self._changed.wait(timeout=0.1)

    def flush(self) -> None:
        """Wait until all that was published is written; no longer, once the tier is off."""
        with self._changed:
            while self._queue.has_work and self._connection.state in ("ready", "hashing") and self._thread.is_alive():
                self._changed.wait(timeout=0.1)

    def close(self) -> None:
        """Write what is queued (nothing, if there is no tier), end the thread. Idempotent."""
        with self._changed:
            self._queue.is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _withdraw(self, goes: Callable[[Batch], bool]) -> list[Batch]:
        """What is queued and *goes* is not written."""
        with self._changed:
            gone = self._queue.withdraw(goes)
        for batch in gone:
            self._skip(batch)
        return gone

    def _work(self) -> None:
        while (work := self._next()) is not None:
            left = None
            try:
                with self._connection.borrow() as tier:
                    if isinstance(work, RememberedAnswer):
                        if tier is not None:
                            tier.remember(work)
                    elif tier is None:
                        left = work
                    else:
                        self._write(tier, work)
            except STORE_ERRORS as error:
                logger.info("a prefix or an answer was not stored: %s", error)
                if isinstance(work, Batch) and not (work.has_failed or work.is_spilled):
                    left = replace(work, has_failed=True)
                elif isinstance(work, Batch):
                    self._skip(work)
            except Exception as error:  # noqa: BLE001  # whatever it is, others are stored
                logger.warning("a prefix or an answer was not stored: %s", error)
                if isinstance(work, Batch):
                    self._skip(work)
            with self._changed:
                if left is not None:
                    self._queue.batches.appendleft(left)
                elif isinstance(work, Batch):
                    self._queue.finish(work)
                self._queue.is_busy = False
                self._changed.notify_all()
        with self._changed:
            for batch in self._queue.withdraw(lambda batch: True):
                self._queue.finish(batch)

    def _next(self) -> Batch | RememberedAnswer | None:
        """What to write next; ``None`` if nothing is left and the store is closing. Keeps leases alive meanwhile."""
        while True:
            with self._changed:
                queue, is_there = self._queue, self._connection.tier is not None
                if is_there and (queue.batches or queue.answers):
                    return queue.take()
                if queue.is_closing:
                    return None
                if self._changed.wait(timeout=TICK_SECONDS):
                    continue
            try:
                with self._connection.borrow() as tier:
                    if tier is not None:
                        tier.tick()
            except Exception as error:  # noqa: BLE001  # the store is off, then
                logger.info("the KV store could not be told what was used: %s", error)

    def _write(self, tier: Tier, batch: Batch) -> None:
        tier.tick()
        if not self._is_current():
            self._connection.give_up("the model's files were changed while in use")
            self._skip(batch)
            return
        self._connection.settle()  # what was lost is dropped before it is written again
        match batch.published:
            case Published() as published:
                self._write_pages(tier, published, batch.seconds)
            case PublishedState() as item:
                self._write_snapshot(tier, item, batch.seconds)

    def _write_pages(self, tier: Tier, published: Published, seconds: float) -> None:
        if not self._pages.has_bytes:
            self._known.written(published.keys)
            return
        num_there = len(tier.contains(published.keys))
        tier.unclaim(published.keys[:num_there])
        self._known.written(published.keys[:num_there])
        for at in range(num_there, len(published.keys), MAX_PAGES):
            parent = published.keys[at - 1] if at else published.parent
            run = Published(published.keys[at : at + MAX_PAGES], parent, published.pages[at : at + MAX_PAGES])
            if self._write_run(tier, self._pages, run, seconds * len(run.keys) / len(published.keys)):
                self._counters.written_pages += len(run.keys)
            else:
                self._skip_pages(published, run.keys)

    def _write_snapshot(self, tier: Tier, item: PublishedState, seconds: float) -> None:
        run = snapshot_run(item, has_page=self._pages.has_bytes)
        if tier.contains(run.keys):
            tier.unclaim(run.keys)
            self._known.written(run.keys)
        elif written := self._write_run(tier, self._snapshots, run, seconds):
            self._counters.written_snapshots += 1
            self._counters.written_snapshot_bytes += written
        else:
            self._skip_snapshot(item)

    def _write_run(self, tier: Tier, source: PageSource, run: Published, seconds: float) -> int:
        """Write *run* as one segment; its bytes, 0: what it continues is not there, or there is no room."""
        if run.parent and not tier.contains([run.parent]):
            return 0
        written = tier.put(source.encode(run, seconds, pinned=self._known.is_pinned(run.keys)))
        if written:
            self._known.written(run.keys)
            self._counters.written_bytes += written
        return written

    def _skip(self, batch: Batch) -> None:
        """*batch* is not going to be stored."""
        match batch.published:
            case Published() as published:
                self._skip_pages(published, published.keys)
            case PublishedState() as item:
                self._skip_snapshot(item)

    def _skip_snapshot(self, item: PublishedState) -> None:
        """*item* is not going to be stored."""
        self._counters.skipped_snapshots += 1
        self._connection.post(lambda tier: tier.unclaim([snapshot_key(item.key)]))

    def _skip_pages(self, published: Published, keys: Sequence[Key]) -> None:
        """*keys* of *published* are not going to be stored."""
        self._counters.skipped_pages += len(keys)
        if published.is_spilled:
            self._known.give_up(keys)
        self._connection.post(lambda tier: tier.unclaim(keys))

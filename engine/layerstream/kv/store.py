"""The persistent prefix store as the engine sees it: take what is there, publish what was computed.

Threads: ``take``, ``publish``, ``collect``, ``give_back`` and the loader belong to the engine's thread; one writer
thread takes digests of the weights, encodes, writes and keeps leases alive. Writing happens behind the sweeps: nobody
waits for it but ``close``.

What a page goes through:

| state | its frame is held by | next |
|---|---|---|
| computed | the prefix table, and whoever shares it | queued, if there is a store |
| queued | the queue as well | being written; or given back, if a request needs the frame |
| being written | the writer as well | stored |
| stored | not for the store's sake | loaded again, evicted, or dropped as damaged |

Invariants: a page is published only under the digests of the very files that its weights came from; it is published
after its parent; a frame that ``publish`` was given comes back from ``collect`` or ``give_back`` exactly once. While
the digests are not known nothing is taken. An error of the store costs a reuse, never a request.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerstream.kv.answers import RememberedAnswer, note, places
from layerstream.kv.choice import Rates, load_seconds, recompute_seconds
from layerstream.kv.codecs import PageCodec
from layerstream.kv.loader import PageLoader
from layerstream.kv.prefix import Published, Stored
from layerstream.kv.segment import MAX_PAGES, Key, PageShape, padded
from layerstream.kv.state import LayerState
from layerstream.kv.tiers.base import NewPages, StoredRun, Tier

logger = logging.getLogger(__name__)

TICK_SECONDS = 3.0

OpenTier = Callable[[Callable[[], bool]], Tier | None]
"""Takes the digests it needs (asked now and then whether to stop) and opens the tier; ``None`` if it cannot be used."""


State = Literal["off", "hashing", "ready", "unusable"]


@dataclass(slots=True)
class StoreCounters:
    """What the store did so far."""

    loaded_tokens: int = 0
    declined_tokens: int = 0
    written_pages: int = 0
    written_bytes: int = 0
    skipped_pages: int = 0
    lost_pages: int = 0
    saved_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class KVStats:
    """What the prefix cache did since the engine started.

    Attributes:
        state: "ready"; "hashing" while the weights' digests are taken; "off"; "unusable", as the log says why.
        hits: prompts that found a part of their KV, in memory or on disk.
        reused_tokens: prompt tokens whose KV was there.
        loaded_tokens: those among them that came from disk; ``loaded_bytes`` were read for them.
        recomputed_tokens: tokens that were on disk and that it was faster to compute again.
        written_bytes: written in ``written_pages`` pages; ``skipped_pages`` were not, for want of room or time.
        lost_pages: found damaged or gone, and computed again.
        saved_seconds: what computing the loaded tokens would have cost, less what loading them did.
    """

    state: State = "off"
    hits: int = 0
    reused_tokens: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    recomputed_tokens: int = 0
    written_pages: int = 0
    written_bytes: int = 0
    skipped_pages: int = 0
    lost_pages: int = 0
    saved_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Batch:
    published: Published
    seconds: float


@dataclass(slots=True)
class _Queue:
    """What the writer has before it, and the frames that it is done with."""

    batches: deque[_Batch] = field(default_factory=deque)
    answers: deque[RememberedAnswer] = field(default_factory=deque)
    done: list[int] = field(default_factory=list)
    is_busy: bool = False
    is_closing: bool = False


class PrefixStore:
    """Pages of earlier prompts, on a tier that outlives the process.

    Args:
        tier: where pages are kept; ``None``: *open_tier*, run on the writer thread, will say.
        is_current: whether the model's files are still those that the digests were taken of.
        on_close: called last.
        rates: what was measured so far.
        load: as in :class:`~layerstream.kv.config.KVStoreConfig`.
    """

    def __init__(
        self,
        states: Sequence[LayerState],
        page_tokens: int,
        codec: PageCodec,
        rates: Callable[[], Rates],
        *,
        tier: Tier | None,
        open_tier: OpenTier,
        is_current: Callable[[], bool],
        load: Literal["auto", "always", "never"] = "auto",
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.counters = StoreCounters()
        self.rates = rates
        self.loader = PageLoader(states, self._open_runs)
        self._states = states
        self._page_tokens = page_tokens
        self._codec = codec
        self._tier = tier
        self._open_tier = open_tier
        self._is_current = is_current
        self._load = load
        self._on_close = on_close
        self._changed = threading.Condition()
        self._queue = _Queue()
        self._pinned: set[Key] = set()
        self._is_unusable = False
        self._given_up: set[Key] = set()
        self._held: dict[int, list[StoredRun]] = {}
        self._thread = threading.Thread(target=self._work, name="layerstream-kv-writer", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """Whether there is anything to find."""
        if self._tier is not None:
            return "ready"
        return "unusable" if self._is_unusable else "hashing"

    @property
    def tier(self) -> Tier | None:
        """Where pages go; ``None`` until the digests are known, or if the tier cannot be used."""
        return self._tier

    def take(self, keys: Sequence[Key], start: int) -> Stored | None:
        """What to do about the pages ``keys[start:]``: load the first of them, compute the rest.

        Returns:
            ``None`` if another process is computing the next one that is not there: ask again later.
        """
        wanted = keys[start:]
        if self._tier is None or not wanted:
            return Stored(0, 0)
        try:
            facts = self._tier.contains(wanted)
            if len(facts) < len(wanted):
                if not self._tier.claim(wanted[len(facts) :]):
                    return None
                facts = self._tier.contains(wanted)  # it may have been finished in between
        except (OSError, sqlite3.Error) as error:
            logger.warning("the KV store could not be asked: %s", error)
            return Stored(0, 0)
        num_tokens = len(facts) * self._page_tokens
        num_bytes, seconds = sum(fact.num_bytes for fact in facts), sum(fact.seconds for fact in facts)
        if not facts:
            return Stored(0, 0)
        rates = self.rates()
        loading, computing = load_seconds(num_bytes, rates), recompute_seconds(num_tokens, seconds, rates)
        if self._load == "never" or (self._load == "auto" and computing < loading):
            self.counters.declined_tokens += num_tokens
            return Stored(0, len(facts))
        self.counters.saved_seconds += max(0.0, computing - loading)
        return Stored(len(facts), 0)

    def abandon(self, keys: Sequence[Key]) -> None:
        """*keys*, which were claimed, are not going to be computed."""
        if self._tier is not None and keys:
            self._tier.unclaim(keys)

    def count_loaded(self, num_pages: int) -> None:
        """A sweep that loaded *num_pages* was committed."""
        self.counters.loaded_tokens += num_pages * self._page_tokens

    def lose(self, key: Key) -> None:
        """Page *key* is damaged or gone: forget it and all that descend from it."""
        self.counters.lost_pages += 1
        if self._tier is not None:
            self._tier.drop(key)

    def pin(self, keys: Sequence[Key]) -> None:
        """Keep *keys* from eviction, those that are there and those that will be."""
        with self._changed:
            self._pinned.update(keys)
        if self._tier is not None:
            self._tier.pin(keys)

    @property
    def can_spill(self) -> bool | None:
        """Whether pages are stored; ``None`` while the digests are not known."""
        return {"ready": True, "hashing": None}.get(self.state, False)

    def has_given_up(self, key: Key) -> bool:
        """Whether page *key* was published and could not be stored."""
        return key in self._given_up

    def hold(self, owner: int, keys: Sequence[Key]) -> None:
        """Keep *keys* open, and so from eviction, until :meth:`unhold`."""
        if keys:
            self._held.setdefault(owner, []).extend(self._open_runs(keys))

    def unhold(self, owner: int) -> None:
        """*owner* needs nothing any more."""
        for run in self._held.pop(owner, []):
            run.close()

    def count_stored(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, are stored."""
        return 0 if self._tier is None else len(self._tier.contains(keys))

    def room(self) -> tuple[int, int]:
        """Bytes that are stored, and how many may be."""
        return (0, 0) if self._tier is None else self._tier.room()

    def page_bytes(self, kv_token_bytes: int) -> int:
        """Bytes of a page on disk; before anything was computed, what it takes without compression."""
        shapes = [state.shape for state in self._states]
        if any(shape is None for shape in shapes):
            return self._page_tokens * kv_token_bytes
        return sum(padded(self._codec.num_bytes(shape, self._page_tokens)) for shape in shapes if shape is not None)

    def wait_until_open(self) -> None:
        """Return when the weights' digests are known, or the store turned out unusable."""
        with self._changed:
            while self.state == "hashing" and self._thread.is_alive():
                self._changed.wait(timeout=0.1)

    def publish(self, published: Published, seconds: float) -> None:
        """Write pages behind the sweeps; *seconds* is what computing them took. Their frames are held until then."""
        with self._changed:
            self._queue.batches.append(_Batch(published, seconds))
            self._changed.notify_all()

    def remember(self, keys: Sequence[Key], prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Keep *answer* to *prompt*, whose whole pages are *keys*, behind the sweeps and after its pages."""
        with self._changed:
            self._queue.answers.append(note(keys, self._page_tokens, prompt, answer))
            self._changed.notify_all()

    def recall(self, keys: Sequence[Key], num_prompt_tokens: int) -> list[list[int]]:
        """Questions with their answers near the end of a prompt, the most recent first."""
        if self._tier is None:
            return []
        try:
            return self._tier.recall(places(keys, self._page_tokens, num_prompt_tokens))
        except (OSError, sqlite3.Error) as error:
            logger.warning("the KV store could not be asked for answers: %s", error)
            return []

    def collect(self) -> list[int]:
        """Frames whose pages were written, or will not be."""
        with self._changed:
            done, self._queue.done = self._queue.done, []
            return done

    def give_back(self) -> list[int]:
        """Frames of pages that nobody has begun to write and nobody waits for: those are not written."""
        with self._changed:
            dropped = [batch.published for batch in self._queue.batches if not batch.published.is_spilled]
            self._queue.batches = deque(batch for batch in self._queue.batches if batch.published.is_spilled)
        for published in dropped:
            self._skip(published.keys)
        return [page for published in dropped for page in published.pages]

    def flush(self) -> None:
        """Wait until all that was published is written."""
        with self._changed:
            while (self._queue.batches or self._queue.answers or self._queue.is_busy) and self._thread.is_alive():
                self._changed.wait(timeout=1.0)

    def close(self) -> None:
        """Write what is queued (nothing, if the digests are not known yet), let go of the tier. Idempotent."""
        with self._changed:
            self._queue.is_closing = True
            self._changed.notify_all()
        self._thread.join()
        self.loader.abort()
        for owner in list(self._held):
            self.unhold(owner)
        tier, self._tier = self._tier, None
        if tier is not None:
            tier.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    def _open_runs(self, keys: Sequence[Key]) -> list[StoredRun]:
        return [] if self._tier is None else self._tier.open(keys)

    def _work(self) -> None:
        try:
            if self._tier is None:
                self._tier = self._open_tier(lambda: self._queue.is_closing)
                self._is_unusable = self._tier is None
        except Exception as error:  # noqa: BLE001  # whatever it is, the engine answers without the store
            self._is_unusable = True
            logger.warning("the KV store cannot be used: %s", error)
        while (work := self._next()) is not None:
            try:
                if isinstance(work, _Batch):
                    self._write(work)
                elif self._tier is not None:
                    self._tier.remember(work)
            except Exception as error:  # noqa: BLE001
                logger.warning("a prefix or an answer was not stored: %s", error)
                if isinstance(work, _Batch):
                    self._skip(work.published.keys)
            with self._changed:
                if isinstance(work, _Batch):
                    self._queue.done.extend(work.published.pages)
                self._queue.is_busy = False
                self._changed.notify_all()

    def _next(self) -> _Batch | RememberedAnswer | None:
        """What to write next; ``None`` if nothing is left and the store is closing. Keeps leases alive meanwhile."""
        while True:
            with self._changed:
                queue = self._queue
                if not (queue.batches or queue.answers or queue.is_closing):
                    self._changed.wait(timeout=TICK_SECONDS)
                if queue.batches or queue.answers:
                    queue.is_busy = True
                    return queue.batches.popleft() if queue.batches else queue.answers.popleft()
                if queue.is_closing:
                    return None
            if self._tier is not None:
                try:
                    self._tier.tick()
                except (OSError, sqlite3.Error) as error:
                    logger.warning("the KV store could not be told what was used: %s", error)

    def _write(self, batch: _Batch) -> None:
        tier, published = self._tier, batch.published
        if tier is None:
            return
        tier.tick()
        if not self._is_current():
            logger.warning("the model's files were changed while in use: nothing is stored from here on")
            self._tier, self._is_unusable = None, True
            return
        shapes = tuple(state.shape for state in self._states)
        assert all(shapes), "published pages were written"
        num_there = len(tier.contains(published.keys))
        tier.unclaim(published.keys[:num_there])
        for at in range(num_there, len(published.keys), MAX_PAGES):
            keys, pages = published.keys[at : at + MAX_PAGES], published.pages[at : at + MAX_PAGES]
            parent = published.keys[at - 1] if at else published.parent
            if parent and not tier.contains([parent]):
                self._skip(keys)
                continue
            seconds = batch.seconds * len(keys) / len(published.keys)
            written = tier.put(self._new_pages(keys, parent, pages, shapes, seconds))  # type: ignore[arg-type]
            if not written:
                self._skip(keys)
                continue
            self.counters.written_pages += len(keys)
            self.counters.written_bytes += written

    def _skip(self, keys: Sequence[Key]) -> None:
        self.counters.skipped_pages += len(keys)
        self._given_up.update(keys)
        self.abandon(keys)

    def _new_pages(
        self, keys: Sequence[Key], parent: Key, pages: Sequence[int], shapes: tuple[PageShape, ...], seconds: float
    ) -> NewPages:
        sizes = [padded(self._codec.num_bytes(shape, self._page_tokens)) for shape in shapes]
        return NewPages(
            keys=tuple(keys),
            parent=parent,
            page_tokens=self._page_tokens,
            codec=self._codec.name,
            shapes=shapes,
            encode_layer=lambda layer: [self._codec.encode(*self._states[layer].page(page)) for page in pages],
            num_bytes=sum(sizes) * len(pages),
            seconds=seconds,
            pinned=not self._pinned.isdisjoint(keys),
        )

"""The persistent prefix store as the engine sees it: take what is there, publish what was computed.

**A store that fails is a store that is off**: answers go on, one warning says why, it is tried again later. After
``kv clear``, or when its folder was deleted under a running engine, it stores again. What is published while it is off
waits, as long as nobody wants the frames. :class:`~layerstream.store.connection.TierConnection` decides all that.

Threads, and what they may wait for:

| thread | does | waits for |
|---|---|---|
| the engine's, callers' | every method here | nothing; ``take`` and ``recall`` a moment, if at all |
| index | opens the tier, takes digests, looks up, claims, pins, drops | disk, other processes |
| writer | encodes, writes, keeps leases alive | disk, other processes |

A ``take`` that was not answered within its moment is asked again; a ``recall`` does without. Only ``look_up``,
``room``, ``flush``, ``wait_until_open`` and ``close`` wait longer, and are not for the engine's thread. ``hold`` opens
files: it is called between sweeps, by whoever carries out what the scheduler decided.

What a page goes through:

| state | its frame is held by | next |
|---|---|---|
| computed | the prefix table, and whoever shares it | queued, if there is a store |
| queued | the queue as well | being written; or given back, if a request needs the frame |
| being written | the writer as well | stored; queued once more, if the store fails |
| stored | not for the store's sake | loaded again, evicted, or dropped as damaged |

Invariants: a page is published only under the digests of the very files that its weights came from; it is published
after its parent; a frame that ``publish`` was given comes back from ``collect`` or ``give_back`` exactly once. While
the digests are not known nothing is taken. No method raises an error of the tier. After ``close`` no thread,
descriptor, lock or temporary file is left.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from layerstream.kv.prefix import Published, Stored
from layerstream.kv.shape import PageShape
from layerstream.kv.state import LayerState
from layerstream.store.answers import RememberedAnswer, note, places
from layerstream.store.choice import Rates, load_seconds, recompute_seconds
from layerstream.store.codecs import PageCodec
from layerstream.store.connection import STORE_ERRORS, OpenTier, Question, State, TierConnection
from layerstream.store.counters import StoreCounters
from layerstream.store.loader import PageLoader
from layerstream.store.lookup import Lookup
from layerstream.store.segment import MAX_PAGES, Key, padded
from layerstream.store.tiers.base import NewPages, PageFacts, StoredRun, Tier
from layerstream.store.write_queue import Batch, WriteQueue

logger = logging.getLogger(__name__)

TICK_SECONDS = 3.0
CALLER_SECONDS = 5.0  # that callers wait for an answer
MOST_NOTED = 2**17  # keys that are known to be stored


class PrefixStore:
    """Pages of earlier prompts, on a tier that outlives the process.

    Args:
        tier: where pages are kept; ``None``: *open_tier* will say.
        open_tier: opens the tier, also again when it has failed.
        is_current: whether the model's files are still those that the digests were taken of.
        rates: what was measured so far.
        load: as in :class:`~layerstream.store.config.KVStoreConfig`.
        failure: why there is no tier yet, if that was tried.
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
        failure: Exception | None = None,
    ) -> None:
        self.counters = StoreCounters()
        self.rates = rates
        self.loader = PageLoader(states, self._open_runs)
        self._states = states
        self._page_tokens = page_tokens
        self._codec = codec
        self._is_current = is_current
        self._load = load
        self._changed = threading.Condition()
        self._queue = WriteQueue()
        self._pinned: set[Key] = set()
        self._given_up: set[Key] = set()
        self._stored: OrderedDict[Key, None] = OrderedDict()
        self._lost: set[Key] = set()
        self._held: dict[int, list[StoredRun]] = {}
        self._last_tier = tier
        self._connection = TierConnection(open_tier, tier, failure, self._tier_changed)
        self._lookup = Lookup(self._connection)
        self._thread = threading.Thread(target=self._work, name="layerstream-kv-writer", daemon=True)
        self._connection.start()
        self._thread.start()

    @property
    def state(self) -> State:
        """Whether there is anything to find."""
        return self._connection.state

    @property
    def reason(self) -> str:
        """Why it is off or unusable; empty if it never was."""
        return self._connection.reason

    @property
    def tier(self) -> Tier | None:
        """Where pages go; ``None`` while there is no such place."""
        return self._connection.tier

    def take(self, keys: Sequence[Key], start: int) -> Stored | None:
        """What to do about the pages ``keys[start:]``: load the first of them, compute the rest.

        Returns:
            ``None`` if another process is computing the next one that is not there, or the tier has not answered yet:
            ask again later.
        """
        if start >= len(keys):
            return Stored(0, 0)
        facts = self._lookup.find(keys, start)
        return None if facts is None else self._choose(facts)

    def _choose(self, facts: Sequence[PageFacts]) -> Stored:
        """Load the pages of *facts*, or compute them again."""
        lost = next((at for at, fact in enumerate(facts) if fact.key in self._lost), len(facts))
        facts = facts[:lost]
        if not facts:
            return Stored(0, 0)
        self._note(fact.key for fact in facts)
        num_tokens = len(facts) * self._page_tokens
        num_bytes, seconds = sum(fact.num_bytes for fact in facts), sum(fact.seconds for fact in facts)
        rates = self.rates()
        loading, computing = load_seconds(num_bytes, rates), recompute_seconds(num_tokens, seconds, rates)
        if self._load == "never" or (self._load == "auto" and computing < loading):
            self.counters.declined_tokens += num_tokens
            return Stored(0, len(facts))
        self.counters.saved_seconds += max(0.0, computing - loading)
        return Stored(len(facts), 0)

    def abandon(self, keys: Sequence[Key]) -> None:
        """*keys*, which were claimed, are not going to be computed."""
        if keys:
            self._connection.post(lambda tier: tier.unclaim(keys))

    def count_loaded(self, num_pages: int) -> None:
        """A sweep that loaded *num_pages* was committed."""
        self.counters.loaded_tokens += num_pages * self._page_tokens

    def lose(self, key: Key) -> None:
        """Page *key* is damaged or gone: forget it and all that descend from it."""
        self.counters.lost_pages += 1
        with self._changed:
            self._stored.pop(key, None)
            self._lost.add(key)
        self._connection.post(lambda tier: tier.drop(key))

    def pin(self, keys: Sequence[Key]) -> None:
        """Keep *keys* from eviction, those that are there and those that will be."""
        with self._changed:
            self._pinned.update(keys)
        self._connection.post(lambda tier: tier.pin(keys))

    @property
    def can_spill(self) -> bool | None:
        """Whether pages are stored; ``None`` while the digests are not known."""
        return {"ready": True, "hashing": None}.get(self.state, False)

    def has_given_up(self, key: Key) -> bool:
        """Whether page *key* was published for a sequence that waits for it, and could not be stored."""
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
        """How many of *keys*, from the first on, are stored as far as was seen here: asked for, or written."""
        with self._changed:
            return next((count for count, key in enumerate(keys) if key not in self._stored), len(keys))

    def look_up(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, are stored."""
        question = Question(lambda tier: len(tier.contains(keys)))
        is_answered = self._connection.ask(question, CALLER_SECONDS, is_patient=True)
        return question.answer or 0 if is_answered else 0

    def room(self) -> tuple[int, int]:
        """Bytes that are stored, and how many may be."""
        question = Question(lambda tier: tier.room())
        is_answered = self._connection.ask(question, CALLER_SECONDS, is_patient=True)
        return question.answer or (0, 0) if is_answered else (0, 0)

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
            self._given_up.difference_update(published.keys)
            self._queue.batches.append(Batch(published, seconds))
            self._changed.notify_all()
        self._give_up_hopeless()

    def remember(self, keys: Sequence[Key], prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Keep *answer* to *prompt*, whose whole pages are *keys*, behind the sweeps and after its pages."""
        with self._changed:
            self._queue.answers.append(note(keys, self._page_tokens, prompt, answer))
            self._changed.notify_all()

    def recall(self, keys: Sequence[Key], num_prompt_tokens: int) -> list[list[int]]:
        """Questions with their answers near the end of a prompt, the most recent first; none if that takes long."""
        wanted = places(keys, self._page_tokens, num_prompt_tokens)
        question = Question(lambda tier: tier.recall(wanted))
        return question.answer or [] if self._connection.ask(question) else []

    def collect(self) -> list[int]:
        """Frames whose pages were written, or will not be."""
        with self._changed:
            return self._queue.take_done()

    def give_back(self) -> list[int]:
        """Frames of pages that nobody has begun to write and nobody waits for: those are not written."""
        dropped = self._withdraw(lambda published: not published.is_spilled)
        return [page for published in dropped for page in published.pages]

    def flush(self) -> None:
        """Wait until all that was published is written; no longer, once the store is off."""
        with self._changed:
            while self._queue.has_work and self.state in ("ready", "hashing") and self._thread.is_alive():
                self._changed.wait(timeout=0.1)

    def close(self) -> None:
        """Write what is queued (nothing, if there is no tier), let go of the tier. Idempotent; never raises."""
        with self._changed:
            self._queue.is_closing = True
            self._changed.notify_all()
        self._thread.join()
        self.loader.abort()
        for owner in list(self._held):
            self.unhold(owner)
        self._connection.close()

    def _open_runs(self, keys: Sequence[Key]) -> list[StoredRun]:
        tier = self.tier or self._last_tier  # what it has found can still be read
        try:
            return [] if tier is None else tier.open(keys)
        except STORE_ERRORS as error:
            logger.warning("a stored prefix is computed again: %s", error)
            return []

    def _note(self, keys: Iterable[Key]) -> None:
        """*keys* are stored."""
        with self._changed:
            self._stored.update(dict.fromkeys(keys))
            while len(self._stored) > MOST_NOTED:
                self._stored.popitem(last=False)

    def _tier_changed(self) -> None:
        """The tier is there, or not any more."""
        tier = self.tier
        self._last_tier = tier or self._last_tier
        with self._changed:
            pinned = tuple(self._pinned)
            self._changed.notify_all()
        if tier is None:
            self._lookup.forget()
        if tier is not None and pinned:
            self._connection.post(lambda tier: tier.pin(pinned))
        self._give_up_hopeless()

    def _give_up_hopeless(self) -> None:
        """Whoever waits for pages to be stored is not kept waiting by a store that is off."""
        if self.state in ("off", "unusable"):
            gone = self._withdraw(lambda published: published.is_spilled or self.state == "unusable")
            with self._changed:
                self._queue.done.extend(page for published in gone for page in published.pages)

    def _withdraw(self, goes: Callable[[Published], bool]) -> list[Published]:
        """What is queued and *goes* is not written."""
        with self._changed:
            gone = self._queue.withdraw(goes)
        for published in gone:
            self._skip(published, published.keys)
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
                if isinstance(work, Batch) and not (work.has_failed or work.published.is_spilled):
                    left = replace(work, has_failed=True)
                elif isinstance(work, Batch):
                    self._skip(work.published, work.published.keys)
            except Exception as error:  # noqa: BLE001  # whatever it is, others are stored
                logger.warning("a prefix or an answer was not stored: %s", error)
                if isinstance(work, Batch):
                    self._skip(work.published, work.published.keys)
            with self._changed:
                if left is not None:
                    self._queue.batches.appendleft(left)
                elif isinstance(work, Batch):
                    self._queue.done.extend(work.published.pages)
                self._queue.is_busy = False
                self._changed.notify_all()
        with self._changed:
            self._queue.done.extend(page for batch in self._queue.batches for page in batch.published.pages)
            self._queue.batches.clear()

    def _next(self) -> Batch | RememberedAnswer | None:
        """What to write next; ``None`` if nothing is left and the store is closing. Keeps leases alive meanwhile."""
        while True:
            with self._changed:
                queue, is_there = self._queue, self.tier is not None
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
        published = batch.published
        tier.tick()
        if not self._is_current():
            self._connection.give_up("the model's files were changed while in use")
            self._skip(published, published.keys)
            return
        self._connection.settle()  # what was lost is dropped before it is written again
        shapes = tuple(state.shape for state in self._states)
        assert all(shapes), "published pages were written"
        num_there = len(tier.contains(published.keys))
        tier.unclaim(published.keys[:num_there])
        self._written(published.keys[:num_there])
        for at in range(num_there, len(published.keys), MAX_PAGES):
            keys, pages = published.keys[at : at + MAX_PAGES], published.pages[at : at + MAX_PAGES]
            parent = published.keys[at - 1] if at else published.parent
            if parent and not tier.contains([parent]):
                self._skip(published, keys)
                continue
            seconds = batch.seconds * len(keys) / len(published.keys)
            written = tier.put(self._new_pages(keys, parent, pages, shapes, seconds))  # type: ignore[arg-type]
            if not written:
                self._skip(published, keys)
                continue
            self._written(keys)
            self.counters.written_pages += len(keys)
            self.counters.written_bytes += written

    def _written(self, keys: Sequence[Key]) -> None:
        self._note(keys)
        self._lost.difference_update(keys)

    def _skip(self, published: Published, keys: Sequence[Key]) -> None:
        """*keys* of *published* are not going to be stored."""
        self.counters.skipped_pages += len(keys)
        if published.is_spilled:
            with self._changed:
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

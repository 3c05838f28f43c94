"""The persistent prefix store as the engine sees it: take what is there, publish what was computed.

A model with recurrent layers goes on only from a page whose *snapshot*, their states after it, is at hand. So what is
there of a prefix ends at its last snapshot: pages beyond it are of no use, and ``take`` does not answer with them. Of a
model whose layers are all recurrent, pages have no bytes: snapshots alone are stored and looked for, and nothing is
claimed.

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
``room``, ``retrieved``, ``flush``, ``wait_until_open`` and ``close`` wait longer, and are not for the engine's thread.
``hold`` opens files: it is called between sweeps, by whoever carries out what the scheduler decided.

What a page goes through:

| state | its frame is held by | next |
|---|---|---|
| computed | the prefix table, and whoever shares it | queued, if there is a store |
| queued | the queue as well | being written; or given back, if a request needs the frame |
| being written | the writer as well | stored; queued once more, if the store fails |
| stored | not for the store's sake | loaded again, evicted, or dropped as damaged |

A snapshot goes through the same, with a slot instead of a frame, and continues its page.

Invariants: a page is published only under the digests of the very files that its weights came from; it is published
after its parent; a frame that ``publish`` was given comes back from ``collect`` or ``give_back`` exactly once, and a
slot that ``publish_state`` was given from ``collect_slots`` or ``give_back_slots``. While the digests are not known
nothing is taken. No method raises an error of the tier. After ``close`` no thread,
descriptor, lock or temporary file is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from layerstream.kv.keys import snapshot_key
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.state import LayerState
from layerstream.kv.stored import Published, PublishedState, Stored
from layerstream.store.answers import note, places
from layerstream.store.choice import Rates, load_seconds, recompute_seconds
from layerstream.store.codecs import PageCodec
from layerstream.store.connection import STORE_ERRORS, OpenTier, Question, State, TierConnection
from layerstream.store.counters import StoreCounters
from layerstream.store.known import KnownKeys
from layerstream.store.loader import PageLoader
from layerstream.store.lookup import Lookup, count_resumable
from layerstream.store.offers import Found, Wanted
from layerstream.store.retrievals import Retrieval
from layerstream.store.segment import Key
from layerstream.store.source import PageSource, snapshot_source
from layerstream.store.tiers.base import StoredRun, Tier
from layerstream.store.write_queue import Batch
from layerstream.store.writer import Writer

logger = logging.getLogger(__name__)

CALLER_SECONDS = 5.0  # that callers wait for an answer
NOTHING = Stored(0, 0)


class PrefixStore:
    """Pages of earlier prompts, on a tier that outlives the process.

    Args:
        tier: where pages are kept; ``None``: *open_tier* will say.
        open_tier: opens the tier, also again when it has failed.
        is_current: whether the model's files are still those that the digests were taken of.
        rates: what was measured so far.
        load: as in :class:`~layerstream.store.config.KVStoreConfig`.
        failure: why there is no tier yet, if that was tried.
        recurrent: the layers that keep states.
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
        recurrent: Sequence[RecurrentLayer] = (),
    ) -> None:
        self.counters = StoreCounters()
        self.rates = rates
        self.loader = PageLoader(states, self._open_runs)
        self.state_loader = PageLoader(recurrent, self._open_runs)
        self._pages = PageSource(states, page_tokens, codec)
        self._snapshots = snapshot_source(recurrent)
        self._load = load
        self._known = KnownKeys()
        self._held: dict[int, list[StoredRun]] = {}
        self._last_tier = tier
        self._connection = TierConnection(open_tier, tier, failure, self._tier_changed)
        self._lookup = Lookup(self._connection)
        self._writer = Writer(self._connection, self._pages, self._snapshots, self._known, self.counters, is_current)
        self._connection.start()
        self._writer.start()

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

    def take(self, keys: Sequence[Key], start: int, resumable: int | None = None) -> Stored | None:
        """What to do about the pages ``keys[start:]``: load the first of them, compute the rest.

        Args:
            resumable: where there are recurrent layers: after how many pages, at most *start*, their states are in
                memory. The answer is then the last snapshot beyond, and the pages up to it that are not in memory; or
                nothing.

        Returns:
            ``None`` if another process is computing the next one that is not there, or the tier has not answered yet:
            ask again later.
        """
        wanted = Wanted(keys, start, resumable, self._pages.has_bytes)
        if wanted.first >= len(keys):
            return NOTHING
        found = self._lookup.find(wanted)
        return None if found is None else self._choose(wanted, found)

    def _choose(self, wanted: Wanted, found: Found) -> Stored:
        """Load what was *found*, or compute it again."""
        sound = found.without(self._known.is_lost)
        self._known.found(fact.key for fact in sound.pages)
        offer, known = wanted.offer(sound), wanted.known(sound.pages)
        if offer is None:
            return Stored(0, 0, num_known=known)
        num_tokens, rates = offer.num_computed * self._pages.page_tokens, self.rates()
        loading, computing = load_seconds(offer.num_bytes, rates), recompute_seconds(num_tokens, offer.seconds, rates)
        if self._load == "never" or (self._load == "auto" and computing < loading):
            self.counters.declined_tokens += num_tokens
            return Stored(0, offer.num_pages, num_known=known)
        self.counters.saved_seconds += max(0.0, computing - loading)
        return Stored(offer.num_pages, 0, offer.boundary, known)

    def abandon(self, keys: Sequence[Key]) -> None:
        """*keys*, which were claimed, are not going to be computed."""
        if keys:
            self._connection.post(lambda tier: tier.unclaim(keys))

    def count_loaded(self, num_pages: int) -> None:
        """A sweep that loaded *num_pages* was committed."""
        self.counters.loaded_tokens += num_pages * self._pages.page_tokens

    def lose(self, key: Key) -> None:
        """Page *key*, or the snapshot of that key, is damaged or gone: forget it and all that descend from it."""
        self.counters.lost_pages += 1
        self._known.lose(key)
        self._connection.post(lambda tier: tier.drop(key))

    def pin(self, keys: Sequence[Key]) -> None:
        """Keep *keys* and their snapshots from eviction, those that are there and those that will be."""
        snapshots = map(snapshot_key, keys) if self._snapshots.has_bytes else ()
        pinned = [*keys, *snapshots]
        self._known.pin(pinned)
        self._connection.post(lambda tier: tier.pin(pinned))

    @property
    def can_spill(self) -> bool | None:
        """Whether pages are stored; ``None`` while the digests are not known."""
        return {"ready": True, "hashing": None}.get(self.state, False)

    def has_given_up(self, key: Key) -> bool:
        """Whether page *key* was published for a sequence that waits for it, and could not be stored."""
        return self._known.has_given_up(key)

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
        return self._known.count_stored(keys)

    def look_up(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, need not be computed: they are stored, and so is the last's snapshot
        where there are recurrent layers."""
        wanted = Wanted(keys, 0, 0 if self._snapshots.has_bytes else None, self._pages.has_bytes)
        question = Question(lambda tier: count_resumable(tier, wanted))
        is_answered = self._connection.ask(question, CALLER_SECONDS, is_patient=True)
        return question.answer or 0 if is_answered else 0

    def room(self) -> tuple[int, int]:
        """Bytes that are stored, and how many may be."""
        question = Question(lambda tier: tier.room())
        is_answered = self._connection.ask(question, CALLER_SECONDS, is_patient=True)
        return question.answer or (0, 0) if is_answered else (0, 0)

    def page_bytes(self, kv_token_bytes: int) -> int:
        """Bytes of a page on disk; before anything was computed, what it takes without compression."""
        num_bytes = self._pages.page_bytes
        return self._pages.assumed_bytes(kv_token_bytes) if num_bytes is None else num_bytes

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a snapshot on disk; 0: there are no recurrent layers."""
        return self._snapshots.page_bytes or 0

    def wait_until_open(self) -> None:
        """Return when the weights' digests are known, or the store turned out unusable."""
        self._writer.wait_until_open()

    def publish(self, published: Published, seconds: float) -> None:
        """Write pages behind the sweeps; *seconds* is what computing them took. Their frames are held until then."""
        self._known.expect(published.keys)
        self._writer.publish(Batch(published, seconds))

    def publish_state(self, item: PublishedState, seconds: float) -> None:
        """Write a snapshot behind the sweeps, after its page; *seconds* is what computing took since the snapshot
        before. Its slot is held until then."""
        self._writer.publish(Batch(item, seconds))

    def remember(self, keys: Sequence[Key], prompt: Sequence[int], answer: Sequence[int], tenant: str = "") -> None:
        """Keep *answer* to *prompt*, whose whole pages are *keys*, behind the sweeps and after its pages."""
        noted = note(keys, self._pages.page_tokens, prompt, answer, is_tenants=bool(tenant))
        if noted is not None:
            self._writer.remember(noted)

    def recall(self, keys: Sequence[Key], num_prompt_tokens: int, tenant: str = "") -> list[list[int]]:
        """Questions with their answers near the end of a prompt, the most recent first; none if that takes long."""
        wanted = places(keys, self._pages.page_tokens, num_prompt_tokens, is_tenants=bool(tenant))
        if not wanted:
            return []
        question = Question(lambda tier: tier.recall(wanted))
        return question.answer or [] if self._connection.ask(question) else []

    def note_retrieved(self, item: Retrieval) -> bool:
        """Count *item*, in its turn; whether there is a tier to count it."""
        return self._connection.post(lambda tier: tier.note_retrieved(item))

    def retrieved(self, item: Retrieval) -> list[float] | None:
        """How often each document of *item* was retrieved; ``None`` if that takes long."""
        question = Question(lambda tier: tier.retrieved(item))
        return question.answer if self._connection.ask(question, CALLER_SECONDS, is_patient=True) else None

    def collect(self) -> list[int]:
        """Frames whose pages were written, or will not be."""
        return self._writer.collect_frames()

    def collect_slots(self) -> list[int]:
        """Slots whose states were written, or will not be."""
        return self._writer.collect_slots()

    def give_back(self) -> list[int]:
        """Frames of pages that nobody has begun to write and nobody waits for: those are not written."""
        return self._writer.give_back_frames()

    def give_back_slots(self) -> list[int]:
        """Slots of states that nobody has begun to write: those are not written."""
        return self._writer.give_back_slots()

    def flush(self) -> None:
        """Wait until all that was published is written; no longer, once the store is off."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is queued (nothing, if there is no tier), let go of the tier. Idempotent; never raises."""
        self._writer.close()
        self.loader.abort()
        self.state_loader.abort()
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

    def _tier_changed(self) -> None:
        """The tier is there, or not any more."""
        tier = self.tier
        self._last_tier = tier or self._last_tier
        pinned = self._known.pinned()
        if tier is None:
            self._lookup.forget()
        if tier is not None and pinned:
            self._connection.post(lambda tier: tier.pin(pinned))
        self._writer.tier_changed()

"""Sequences whose KV is larger than the memory for it: whole pages of their prompt lie in the store and stream.

Pure accounting, for the scheduler: that the store is to hold pages is decided here, and carried out by others
(:mod:`layerstream.scheduling.decisions`). A page of such a sequence is in one of two places:

| place | its KV is | from when |
|---|---|---|
| a frame | in memory | it is about to be computed |
| a transit slot | in the store; every sweep brings it past, layer by layer | the store has it |

A transit slot is room for one page of the few layers that are in hand, so a prompt of any length needs little memory,
and costs its KV's bytes in every sweep: as much as the weights that the memory now holds instead.

Invariants:

* a sequence is *long* from its admission on: it holds transit slots for all whole pages of its prompt, frames for the
  rest of it and its longest answer, and frames for the chunks of one sweep (its *reserve*);
* long sequences with a common beginning share slots; the beginning is computed by one of them at a time;
* a page moves from its frame to its slot when the store has it and nobody else holds the frame; the frame goes back to
  the reserve. A sequence that waits for the store is in no sweep, others are;
* what a slot streams is held in the store, so it cannot be evicted, until the sequence goes;
* long sequences do not enter their pages in the prefix table: the store is what they share.
"""

from __future__ import annotations

from collections import deque

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import PageLoad
from layerstream.core.tenancy import Tenancy
from layerstream.errors import StorageFull
from layerstream.kv.keys import Key
from layerstream.kv.pages import PagePool
from layerstream.kv.stored import Published, SpillStore
from layerstream.scheduling.beginnings import Beginnings
from layerstream.scheduling.decisions import Decision, Hold, LetGo


class Spill:
    """The long sequences among the running ones."""

    def __init__(
        self,
        pool: PagePool,
        store: SpillStore | None,
        sweep_pages: int,
        decisions: deque[Decision],
        beginnings: Beginnings,
    ) -> None:
        self._pool = pool
        self._store = store
        self._sweep_pages = sweep_pages
        self._decisions = decisions
        self._beginnings = beginnings
        self._slots: dict[Key, int] = {}
        self._running: list[Sequence] = []

    def clear(self) -> None:
        """There are no sequences; their frames and slots are somebody else's to free."""
        self._slots, self._running = {}, []

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that the longest prompt may have; 0 if nothing can be spilled."""
        return (self._pool.num_transit + 1) * self._pool.page_tokens if self._num_frames > 0 else 0

    @property
    def _num_frames(self) -> int:
        """Frames that are left for the end of a prompt and its answer."""
        return self._pool.num_pages - self._sweep_pages if self._pool.num_transit else 0

    def max_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens that a prompt of *num_prompt_tokens* and its answer may have, as a long sequence."""
        size = self._pool.page_tokens
        num_whole = max(0, num_prompt_tokens - 1) // size
        if num_whole > self._pool.num_transit or self._num_frames <= 0:
            return 0
        return (num_whole + self._num_frames) * size

    def num_frames(self, sequence: Sequence) -> int:
        """Frames that *sequence* needs as a long one."""
        return self._pool.pages_for(sequence.max_num_tokens) - len(sequence.prefix_keys) + self._sweep_pages

    def wants(self, sequence: Sequence) -> bool:
        """Whether *sequence* does not fit the frames even if it had all of them."""
        return self._pool.pages_for(sequence.max_num_tokens) > self._pool.num_pages

    def admit(self, sequence: Sequence) -> bool:
        """Give *sequence* what it needs; False, and no change, while that is not to be had.

        Raises:
            StorageFull: it needs more than there is, or there is no store that could take its pages.
        """
        store = self._store
        if store is None or store.can_spill is False:
            raise StorageFull(
                "the prompt's KV does not fit the memory budget, and there is no KV store to take it, or it failed "
                "(the log says why)"
            )
        keys = sequence.prefix_keys
        if len(keys) > self._pool.num_transit or self.num_frames(sequence) > self._pool.num_pages:
            raise StorageFull(
                f"a prompt of {sequence.num_prompt_tokens} tokens with an answer of {sequence.params.max_tokens} needs "
                "more memory than there is for KV: give the engine more, or ask for less"
            )
        is_begun = any(other.prefix_keys[:1] == keys[:1] and self._is_on_its_way(other) for other in self._running)
        if store.can_spill is None or is_begun:
            return False
        reserve = self._pool.acquire(self.num_frames(sequence))
        if reserve is None:
            return False
        new = [key for key in keys if key not in self._slots]
        fresh = self._pool.acquire_transit(len(new))
        found = None if fresh is None else self._beginnings.find(keys, 0)
        if fresh is None or found is None:
            self._pool.release(reserve + (fresh or []))
            return False
        stored, _ = found
        self._pool.share([self._slots[key] for key in keys if key in self._slots])
        self._slots.update(zip(new, fresh, strict=True))
        slots = [self._slots[key] for key in keys]
        num_loaded = stored.num_pages * self._pool.page_tokens
        sequence.tenancy = Tenancy(
            num_computed=num_loaded,
            pages=slots[: stored.num_pages],
            reserve=reserve,
            slots=slots,
            num_cached=num_loaded,
            num_loaded=num_loaded,
            num_declined=stored.num_declined * self._pool.page_tokens,
        )
        self._running.append(sequence)
        if stored.num_pages:
            self._decisions.append(Hold(sequence, tuple(keys[: stored.num_pages])))
        return True

    def _is_on_its_way(self, sequence: Sequence) -> bool:
        """Whether whole pages of its prompt are still to be computed, or to be stored."""
        prompt = sequence.pages[: len(sequence.prefix_keys)]
        return not sequence.is_prefilled or not all(map(self._pool.is_transit, prompt))

    def settle(self, sequence: Sequence) -> bool:
        """Move pages that the store has by now from their frames to their slots.

        Returns:
            False if the store had one and has it no longer, so that *sequence* has to start anew.

        Raises:
            StorageFull: the store could not take one of them.
        """
        assert self._store is not None
        held = sequence.tenancy
        first = next((at for at, page in enumerate(held.pages) if not self._pool.is_transit(page)), None)
        last = min(sequence.num_computed // self._pool.page_tokens, len(sequence.prefix_keys))
        if first is None or first >= last:
            return True
        keys = sequence.prefix_keys[first:last]
        num_stored = self._store.count_stored(keys)
        if num_stored < len(keys) and self._store.has_given_up(keys[num_stored]):
            raise StorageFull(
                "the prompt's KV does not fit the memory budget, and the KV store has no room for it: give it more "
                "(KVStoreConfig(max_bytes=...)), or the engine more memory"
            )
        for at in range(first, first + num_stored):
            if self._pool.refcount(held.pages[at]) > 1:
                break  # the writer is about to let go of it
            held.reserve.append(held.pages[at])
            held.pages[at] = held.slots[at]
            self._decisions.append(Hold(sequence, (sequence.prefix_keys[at],)))
        missing = first + num_stored
        return missing == last or self._pool.refcount(held.pages[missing]) > 1

    def frames(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make sure that pages of *num_tokens* tokens have frames, or slots; False while there are none to be had."""
        held = sequence.tenancy
        num_whole = len(sequence.prefix_keys)
        num_tail = self._pool.pages_for(sequence.max_num_tokens) - num_whole
        wanted = self._pool.pages_for(num_tokens)
        missing = max(0, min(wanted, num_whole) - len(held.pages))
        if missing and missing > len(held.reserve) - num_tail:
            return False
        for _ in range(missing):
            held.pages.append(held.reserve.pop())
        if wanted > len(held.pages):
            held.pages += held.reserve[:num_tail]
            held.reserve = held.reserve[num_tail:]
        return True

    def publish(self, sequence: Sequence, first: int, last: int) -> Published | None:
        """Whole pages ``[first, last)`` of *sequence* were computed; those of the prompt are for the store."""
        last = min(last, len(sequence.prefix_keys))
        if first >= last:
            return None
        parent = sequence.prefix_keys[first - 1] if first else b""
        return Published(tuple(sequence.prefix_keys[first:last]), parent, tuple(sequence.pages[first:last]), True)

    def loads(self, sequence: Sequence) -> list[PageLoad]:
        """What a sweep with *sequence* has to bring past."""
        pairs = zip(sequence.prefix_keys, sequence.pages, strict=False)
        return [PageLoad(key, page) for key, page in pairs if self._pool.is_transit(page)]

    def remove(self, sequence: Sequence) -> None:
        """*sequence* goes, or starts anew: free what it holds."""
        assert self._store is not None
        self._running.remove(sequence)
        self._decisions.append(LetGo(sequence))
        computed = sequence.num_computed // self._pool.page_tokens
        self._store.abandon(sequence.prefix_keys[computed:])
        self._pool.release(self.held_by(sequence))
        self._slots = {key: slot for key, slot in self._slots.items() if self._pool.refcount(slot)}
        held = sequence.tenancy
        held.pages, held.reserve, held.slots = [], [], []

    def held_by(self, sequence: Sequence) -> list[int]:
        """Every frame and slot that *sequence* holds, once each."""
        frames = [page for page in sequence.pages if not self._pool.is_transit(page)]
        return [*frames, *sequence.tenancy.reserve, *sequence.tenancy.slots]

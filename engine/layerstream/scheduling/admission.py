"""Who begins, and with what memory.

A sequence is admitted when there is memory for its prompt and for the logits of its row, in the order of
:mod:`layerstream.scheduling.queue`; until then it waits, and so do those behind it. Exceptions, whom others may pass:

* whoever needs what another process is just computing;
* whoever has passages that are computed as contexts of their own first, while one of these waits;
* whoever fails of what the store says, which is its own misfortune.

What a sequence begins with: pages that it shares, pages of its passages as far as there is memory beside, frames of its
own, and, with recurrent layers, a slot. It gets all of it, or nothing is changed. What was kept of one that was
suspended is brought back. A sequence that does not fit the memory as a whole begins with room in the store
(:mod:`layerstream.scheduling.spill`), and as it stands: there is no memory for its passages.
"""

from __future__ import annotations

from contextlib import closing

from layerstream.core.sequence import Sequence
from layerstream.errors import StorageFull
from layerstream.kv.stored import Stored
from layerstream.scheduling.books import Books, groups_of
from layerstream.scheduling.memory import Memory
from layerstream.scheduling.packing import SweepLimits


class Admission:
    """Takes sequences from those that wait in *books* to those that run.

    Args:
        limits: which shape the sweeps; of them, how many may be sampled from in one, and what attends together.
    """

    def __init__(self, books: Books, memory: Memory, limits: SweepLimits) -> None:
        self._books = books
        self._memory = memory
        self._max_sequences = limits.max_sequences
        self._chunk_tokens = limits.chunk_tokens

    def admit(self) -> None:
        """Begin with all that there is memory for, in their order; those behind the first that has to wait, wait."""
        memory, running = self._memory, self._books.running
        with closing(self._books.waiting.in_order(self._num_cached)) as waiting:
            for sequence in waiting:
                if not (self._has_room_for_logits(sequence) and memory.states.has_room((*running, sequence))):
                    return
                if any(other in self._books.waiting for other in sequence.owes):
                    continue
                if memory.spill.wants(sequence):
                    self._leave_exact(sequence)
                    if not self._admit_long(sequence):
                        return
                    continue
                if sequence.group is not None and not self._has_room_for_beams(sequence):
                    return
                shared = memory.prefixes.match(sequence.prefix_keys)
                memory.pool.share(shared)
                own = self._acquire_beside_passages(sequence, shared)
                if own is None:
                    memory.pool.release(shared)
                    return
                if not self._begin_or_fail(sequence, shared, own):  # it failed, or is being computed elsewhere
                    sequence.tenancy.pages = []
                    memory.blending.release(sequence)
                    memory.pool.release(shared + own)

    def _leave_exact(self, sequence: Sequence) -> None:
        """*sequence* is computed as it stands: there is no memory for its passages beside it."""
        if sequence.passages:
            sequence.passages = ()
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            sequence.prefix_keys = self._memory.prefixes.keys_of(prompt, sequence.tenant)

    def _admit_long(self, sequence: Sequence) -> bool:
        """Admit a sequence that does not fit the frames; False while it has to wait, and those behind it too."""
        missing = self._memory.spill.num_frames(sequence) - self._memory.pool.num_free
        if missing > 0:
            self._memory.prefixes.evict(missing)
        try:
            if not self._memory.spill.admit(sequence):
                return False
        except StorageFull as error:
            self._books.fail(sequence, error)
            return True
        self._memory.states.begin(sequence)
        self._books.admit(sequence)
        return True

    def _acquire_beside_passages(self, sequence: Sequence, shared: list[int]) -> list[int] | None:
        """Frames for *sequence*, and a hold on the pages of as many of its passages as there is memory for beside."""
        num_shared = len(shared) * self._memory.pool.page_tokens
        count = 0 if sequence.group is not None else len(sequence.passages)  # beams have all that they need, or wait
        while True:
            count = self._memory.blending.hold(sequence, count, num_shared)
            own = self._acquire(sequence, shared)
            if own is not None or not count:
                return own
            self._memory.blending.release(sequence)
            count -= 1

    def _acquire(self, sequence: Sequence, shared: list[int]) -> list[int] | None:
        """Frames for *sequence* behind those that it shares.

        For its longest answer if they are free, and up to the end of its prompt's last chunk: that attends in the shape
        of a whole one, and where there are no pages, all of its past is copied to put zeros behind it (in each layer; a
        tenth to a fifth of the last sweep of 4,000 tokens). Else for what it has and one token more, with one to spare
        for each that runs, so that it is not admitted only to be suspended.
        """
        pool, running = self._memory.pool, self._books.running
        after = shared[-1] if shared else None
        most = pool.pages_for(sequence.max_num_tokens) - len(shared)
        chunk = self._chunk_tokens
        whole = pool.pages_for(-(-sequence.num_prompt_tokens // chunk) * chunk) - len(shared)
        if sequence.group is None and most < whole <= pool.num_free:
            return pool.acquire(whole, after=after)
        if most <= pool.num_free:
            return pool.acquire(most, after=after)
        least = pool.pages_for(min(sequence.num_tokens + 1, sequence.max_num_tokens)) - len(shared)
        spare = min(len(running), most - least)
        return self._memory.frames.acquire(least + spare, after, running)

    def _begin_or_fail(self, sequence: Sequence, shared: list[int], own: list[int]) -> bool:
        """:meth:`_begin`; what the store could not say is its own misfortune."""
        try:
            return self._begin(sequence, shared, own)
        except Exception as error:  # noqa: BLE001  # nothing has changed for the others
            self._books.fail(sequence, error)
            return False

    def _begin(self, sequence: Sequence, shared: list[int], own: list[int]) -> bool:
        """*sequence* runs, in pages that it shares and its own; False, and no change, if another process is at it."""
        size, tenancy = self._memory.pool.page_tokens, sequence.tenancy
        tenancy.pages = shared + own
        is_first, stored = tenancy.suspension is None, Stored(0, 0)
        if is_first or not self._resume(sequence, len(shared)):
            found = self._memory.beginnings.find(sequence.prefix_keys, len(shared))
            if found is None:
                return False
            stored, num_pages = found
            tenancy.num_computed = num_pages * size
        if is_first:
            tenancy.num_cached = tenancy.num_computed
            tenancy.num_loaded = stored.num_pages * size
            tenancy.num_declined = stored.num_declined * size
        self._memory.states.begin(sequence)
        self._books.admit(sequence)
        self._memory.prefixes.enter(sequence.prefix_keys, len(shared), sequence, stored.num_pages)
        return True

    def _resume(self, sequence: Sequence, num_shared: int) -> bool:
        """Bring back what was kept of *sequence*, its states too; False: it begins anew."""
        frames, states = self._memory.frames, self._memory.states
        slot = states.acquire() if states.is_needed else None
        if states.is_needed and slot is None:
            frames.forget(sequence)
        elif frames.resume(sequence, num_shared, slot):
            sequence.tenancy.state = slot
            return True
        if slot is not None:
            states.give_back(slot)
        return False

    def _has_room_for_logits(self, sequence: Sequence) -> bool:
        """Whether all that run, and *sequence*, may be sampled from in one sweep."""
        everyone = (*self._books.running, sequence)
        num_alone = sum(other.group is None and other.needs_logits for other in everyone)
        return num_alone + sum(group.num_rows for group in groups_of(everyone)) <= self._max_sequences

    def _has_room_for_beams(self, sequence: Sequence) -> bool:
        """Whether all searches that run, and that of *sequence*, could have what they may need at once."""
        num_pages = sum(group.num_pages for group in groups_of((*self._books.running, sequence)))
        num_long = sum(len(self._memory.spill.held_by(other)) for other in self._books.running if other.is_long)
        return num_pages + num_long <= self._memory.pool.num_pages

    def _num_cached(self, sequence: Sequence) -> int:
        if sequence.is_passage:
            return sequence.num_prompt_tokens  # before whoever waits for it
        return self._memory.beginnings.count_cached(sequence.prefix_keys) * self._memory.pool.page_tokens

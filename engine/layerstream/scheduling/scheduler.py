"""Decides what goes into the next sweep. Pure: it moves no tensor, reads no clock, opens no file.

Beside the sweep it decides what is to be done first about pages on disk; whoever runs the sweep does it
(``next_decision``, :mod:`layerstream.scheduling.decisions`). A store is asked for what it knows, and answers within a
moment; those who guess are asked too, and they may compute.

Who runs, and with what memory, is decided here; which rows of those that run are in the sweep, in
:mod:`layerstream.scheduling.composing`. Rules:

* a sequence is admitted when there is memory for its prompt and for the logits of its row, in the order of
  :mod:`layerstream.scheduling.queue`; until then it waits. Its answer gets memory as it grows, and where there is none,
  the sequence that was admitted last waits again, with what it has computed (:mod:`layerstream.scheduling.frames`).
  Pages of its prompt that others have computed, or are going to, it shares; prefixes that nobody uses any more are
  evicted when their pages are wanted. What a store has of the rest is loaded while the first sweep that needs it goes
  on; what another process is just computing is waited for, and others go ahead meanwhile;
* a sequence that does not fit the memory for KV as a whole runs all the same, with pages of its prompt in the store
  (:mod:`layerstream.scheduling.spill`);
* a model with recurrent layers goes on from states, which are there at the end of some pages only: a sequence begins at
  the last of them that is there, or is coming, and computes what it shares beyond it once more
  (:mod:`layerstream.scheduling.states`);
* a removed sequence is in no later sweep and its pages are free at once;
* what a sequence fails of while it is admitted is its own (``take_failed``); after any other error here, ``reset``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import replace

from layerstream.core.sequence import BeamGroup, Sequence
from layerstream.core.sweep import Sweep
from layerstream.core.tenancy import Tenancy
from layerstream.errors import StorageFull
from layerstream.kv.pages import PagePool
from layerstream.kv.prefix import PrefixTable
from layerstream.kv.stored import Published, PublishedState, SpillStore, Stored
from layerstream.scheduling.beginnings import Beginnings
from layerstream.scheduling.blending import Blending, Recompute
from layerstream.scheduling.budget import ExpertLoad, SweepBudget
from layerstream.scheduling.composing import NO_DRAFTING, Composer, Drafting
from layerstream.scheduling.decisions import Decision, Forget, LetGo
from layerstream.scheduling.frames import Frames
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.queue import WaitingQueue
from layerstream.scheduling.spill import Spill
from layerstream.scheduling.states import States


class Scheduler:
    """Holds the waiting and the running sequences.

    Args:
        store: what outlives the process; ``None``: prefixes are shared in memory alone.
        read_seconds: what reading the streamed weights of a sweep takes.
        can_swap: whether pages may be kept elsewhere when memory is short.
        experts: what rows bring in a mixture of experts; ``None``: it is none, or they come with their block.
        num_slots: for the states of recurrent layers; 0: there are none.
        stride: pages between snapshots of them.
        recompute: how much of what is moved is computed again; ``None``: as :class:`Recompute` has it.
    """

    def __init__(
        self,
        limits: SweepLimits,
        pool: PagePool,
        store: SpillStore | None = None,
        read_seconds: Callable[[], float] = lambda: 0.0,
        *,
        can_swap: bool = False,
        experts: ExpertLoad | None = None,
        num_slots: int = 0,
        stride: int = 1,
        recompute: Recompute | None = None,
    ) -> None:
        assert limits.chunk_tokens % pool.page_tokens == 0, "a chunk has whole pages"
        self.budget = SweepBudget(
            limits.decode_rows, limits.rows_per_block, limits.max_draft_rows, read_seconds, experts
        )
        self.pool = pool
        self._store = store
        self._decisions: deque[Decision] = deque()
        self.states = States(num_slots, pool.page_tokens, stride, store)
        self.prefixes = PrefixTable(pool)
        self._beginnings = Beginnings(self.prefixes, self.states, store, pool.page_tokens)
        num_sweep_pages = (-(-limits.max_tokens // limits.chunk_tokens) + 1) * (limits.chunk_tokens // pool.page_tokens)
        self._spill = Spill(pool, store, num_sweep_pages, self._decisions, self._beginnings)
        self._failed: list[tuple[Sequence, Exception]] = []
        self._frames = Frames(pool, self.prefixes, store, self._decisions, can_swap=can_swap)
        self._blending = Blending(pool, self.prefixes, recompute or Recompute())
        self._composer = Composer(limits, self.budget, pool, self.prefixes, self._spill, self.states, self._blending)
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []

    @property
    def limits(self) -> SweepLimits:
        """What sweeps keep to by now."""
        return self._composer.limits

    @property
    def num_waiting(self) -> int:
        """Sequences that were not admitted yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Let *sequence* wait for its pages. The caller made sure that the pool as a whole could hold it."""
        if not sequence.prefix_keys and not sequence.reads_all_rows:
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            sequence.prefix_keys = self.prefixes.keys_of(prompt, sequence.tenant)
        self._waiting.enter(sequence)
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """*sequence* is finished, cancelled or failed: forget it and free its pages. One that is not here is left."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._waiting.leave(sequence)
            self.states.release(sequence)
            if sequence.is_long:
                self._spill.remove(sequence)
                return
            self._abandon(sequence)
            self.pool.release(sequence.pages)
            sequence.tenancy.pages = []
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
            self._waiting.leave(sequence)
            self._frames.forget(sequence)

    def reset(self) -> None:
        """Forget all sequences and prefixes, in whatever state an error left them. Frames that the store holds stay
        its own.

        Raises:
            AssertionError: pages are lost all the same.
        """
        running, waiting = self._running, list(self._waiting)
        self._running, self._waiting, self._failed = [], WaitingQueue(), []
        self.prefixes.clear()
        self._spill.clear()
        self.states.reset((*running, *waiting))
        for sequence in (*running, *waiting):
            if self._store is not None:
                self._store.abandon(sequence.prefix_keys[sequence.num_computed // self.pool.page_tokens :])
            sequence.tenancy = Tenancy()
        undone = [decision.sequence for decision in self._decisions]
        self._decisions.clear()
        for sequence in dict.fromkeys((*running, *waiting, *undone)):
            self._decisions += Forget(sequence), LetGo(sequence)
        held = self._frames.held_by_store
        for page in range(self.pool.num_pages + self.pool.num_transit):
            self.pool.release([page] * (self.pool.refcount(page) - held[page]))
        self.check_integrity()

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """*child*, a copy of the running *parent*, runs beside it and shares its whole pages.

        Returns:
            The page that it shares a part of, and the one of its own that is to become a copy of it; ``None`` where
            the parent's tokens end with a page.

        Raises:
            StorageFull: there is no page for it, even if all others wait.
        """
        num_whole, rest = divmod(parent.num_computed, self.pool.page_tokens)
        shared = parent.pages[:num_whole]
        own: list[int] | None = []
        while rest and not (own := self._frames.acquire(1, None, self._running)):
            if not (victims := self._victims()):
                raise StorageFull("there is no memory for one more beam: ask for fewer, or give the engine more memory")
            self._suspend(victims[-1])
        self.pool.share(shared)
        own_pages = [*shared, *(own or [])]
        child.tenancy = replace(parent.tenancy, pages=own_pages, reserve=[], slots=[], sources={}, previous=None)
        self.states.fork(child)
        self._running.insert(self._running.index(parent) + 1, child)
        self._waiting.enter(child)
        return (parent.pages[num_whole], child.pages[num_whole]) if own else None

    def schedule(self, drafting: Drafting = NO_DRAFTING) -> Sweep | None:
        """The next sweep, with guesses of *drafting*; ``None`` when nothing is there to run."""
        self._frames.take_back_stored()
        self._settle()
        self._grow()
        self._admit()
        for sequence in self._beginnings.find_states(self._running):
            self._restart(sequence)
        self._waiting.tick()
        return self._composer.compose(self._running, drafting)

    def commit(self, sweep: Sweep) -> tuple[list[Published], list[PublishedState]]:
        """The rows of *sweep* are in their pages: sequences advance, and whole pages of prompts may be shared.

        Returns:
            What may be stored, pages and snapshots. With a store their frames and slots are held until it names them in
            ``collect`` or ``give_back``, ``collect_slots`` or ``give_back_slots``.
        """
        self.prefixes.loaded(load for load in sweep.loads if not self.pool.is_transit(load.page))
        states = self.states.commit(sweep)
        before = {span.sequence: span.sequence.num_computed for _, span in sweep.known_spans()}
        for _, span in sweep.known_spans():
            span.sequence.tenancy.num_computed = span.stop
            self._waiting.serve(span.sequence, len(span))
        for sequence, moves in sweep.moves.items():
            sequence.tenancy.num_blended += sum(map(len, moves)) - sweep.staying.get(sequence, 0)
            sequence.tenancy.blended_to = moves[-1].stop
        for sequence in before:
            if sequence.is_prefilled:
                self._blending.release(sequence)
        found = [self._publish(sequence, start) for sequence, start in before.items()]
        published = [item for item in found if item is not None]
        if self._store is not None:
            for item in published:
                self._frames.share_with_store(item.pages)
        return published, states

    def accept(self, sequence: Sequence, num_tokens: int) -> None:
        """The KV of *num_tokens* more of *sequence* is in its pages: they were guessed, and right."""
        sequence.tenancy.num_computed += num_tokens

    def rewind(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens of *sequence* from *num_tokens* on are computed once more."""
        if num_tokens < sequence.num_computed:
            self.states.rewind(sequence, num_tokens)
        sequence.tenancy.rewind(num_tokens)

    def lose(self, key: bytes) -> None:
        """The store has lost page or snapshot *key*, and the sweep that was to load it had no effect: it is
        computed."""
        self.states.lose(key, self._running)
        for heir, position in self.prefixes.lose(key, self._running):
            self.rewind(heir, position * self.pool.page_tokens)
            heir.tenancy.num_loaded -= self.pool.page_tokens
        for sequence in [s for s in self._running if s.is_long and key in s.prefix_keys]:
            self._restart(sequence)

    def shrink(self) -> bool:
        """A sweep did not fit the memory: from now on they carry half as much. False: they cannot carry less."""
        return self._composer.shrink()

    def next_decision(self) -> Decision | None:
        """What is to be done next, before a row is computed or a page copied; ``None``: nothing."""
        return self._decisions.popleft() if self._decisions else None

    def lose_kept(self, sequence: Sequence) -> None:
        """What was to be kept of *sequence* while it was suspended is not to be had: it is computed again."""
        is_running = sequence in self._running
        if is_running:
            self._running.remove(sequence)
        self._frames.unmake(sequence)
        self.states.release(sequence)
        if is_running:
            self._abandon(sequence)
            self._waiting.add(sequence)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """*sequence* cannot go on because of *error*."""
        if all(other is not sequence for other, _ in self._failed):
            self._failed.append((sequence, error))

    def take_failed(self) -> list[tuple[Sequence, Exception]]:
        """Sequences that cannot go on, and why; they are still to be removed."""
        failed, self._failed = self._failed, []
        return failed

    def count_cached(self, keys: Seq[bytes]) -> int:
        """How many of the pages *keys*, from the first on, are there to begin after. Changes nothing: any thread may
        ask."""
        return self._beginnings.count_cached(keys)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that the longest prompt may have, an answer of one token included."""
        return max(self.pool.num_tokens, self._spill.max_prompt_tokens)

    def max_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens that a prompt of *num_prompt_tokens* and its answer may have together."""
        return max(self.pool.num_tokens, self._spill.max_tokens(num_prompt_tokens))

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless pages, page tables and prefixes account for each other."""
        self.prefixes.check_integrity()
        running = [self._spill.held_by(s) if s.is_long else s.pages for s in self._running]
        sources = [pages for sequence in self._running for pages in sequence.tenancy.sources.values()]
        self.pool.check_integrity(
            [*running, *sources, self.prefixes.held_pages(), [*self._frames.held_by_store.elements()]]
        )
        self.states.check_integrity(self._running)
        assert not any(sequence.pages for sequence in self._waiting), "a waiting sequence holds pages"

    def _admit(self) -> None:
        with closing(self._waiting.in_order(self._num_cached)) as waiting:
            for sequence in waiting:
                if not (self._has_room_for_logits(sequence) and self.states.has_room((*self._running, sequence))):
                    return
                if any(other in self._waiting for other in sequence.owes):
                    continue
                if self._spill.wants(sequence):
                    self._leave_exact(sequence)
                    if not self._admit_long(sequence):
                        return
                    continue
                if sequence.group is not None and not self._has_room_for_beams(sequence):
                    return
                shared = self.prefixes.match(sequence.prefix_keys)
                self.pool.share(shared)
                own = self._acquire_beside_passages(sequence, shared)
                if own is None:
                    self.pool.release(shared)
                    return
                if not self._begin_or_fail(sequence, shared, own):  # it failed, or is being computed elsewhere
                    sequence.tenancy.pages = []
                    self._blending.release(sequence)
                    self.pool.release(shared + own)

    def _leave_exact(self, sequence: Sequence) -> None:
        """*sequence* is computed as it stands: there is no memory for its passages beside it."""
        if sequence.passages:
            sequence.passages = ()
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            sequence.prefix_keys = self.prefixes.keys_of(prompt, sequence.tenant)

    def _acquire_beside_passages(self, sequence: Sequence, shared: list[int]) -> list[int] | None:
        """Frames for *sequence*, and a hold on the pages of as many of its passages as there is memory for beside."""
        num_shared = len(shared) * self.pool.page_tokens
        count = 0 if sequence.group is not None else len(sequence.passages)  # beams have all that they need, or wait
        while True:
            count = self._blending.hold(sequence, count, num_shared)
            own = self._acquire(sequence, shared)
            if own is not None or not count:
                return own
            self._blending.release(sequence)
            count -= 1

    def _acquire(self, sequence: Sequence, shared: list[int]) -> list[int] | None:
        """Frames for *sequence* behind those that it shares.

        For its longest answer if they are free. Else for what it has and one token more, with one to spare for each
        that runs, so that it is not admitted only to be suspended.
        """
        after = shared[-1] if shared else None
        most = self.pool.pages_for(sequence.max_num_tokens) - len(shared)
        if most <= self.pool.num_free:
            return self.pool.acquire(most, after=after)
        least = self.pool.pages_for(min(sequence.num_tokens + 1, sequence.max_num_tokens)) - len(shared)
        spare = min(len(self._running), most - least)
        return self._frames.acquire(least + spare, after, self._running)

    def _begin_or_fail(self, sequence: Sequence, shared: list[int], own: list[int]) -> bool:
        """:meth:`_begin`; what the store could not say is its own misfortune."""
        try:
            return self._begin(sequence, shared, own)
        except Exception as error:  # noqa: BLE001  # nothing has changed for the others
            self.fail(sequence, error)
            return False

    def _begin(self, sequence: Sequence, shared: list[int], own: list[int]) -> bool:
        """*sequence* runs, in pages that it shares and its own; False, and no change, if another process is at it."""
        size, tenancy = self.pool.page_tokens, sequence.tenancy
        tenancy.pages = shared + own
        is_first, stored = tenancy.suspension is None, Stored(0, 0)
        if is_first or not self._resume(sequence, len(shared)):
            found = self._beginnings.find(sequence.prefix_keys, len(shared))
            if found is None:
                return False
            stored, num_pages = found
            tenancy.num_computed = num_pages * size
        if is_first:
            tenancy.num_cached = tenancy.num_computed
            tenancy.num_loaded = stored.num_pages * size
            tenancy.num_declined = stored.num_declined * size
        self.states.begin(sequence)
        self._waiting.remove(sequence)
        self._running.append(sequence)
        self.prefixes.enter(sequence.prefix_keys, len(shared), sequence, stored.num_pages)
        return True

    def _resume(self, sequence: Sequence, num_shared: int) -> bool:
        """Bring back what was kept of *sequence*, its states too; False: it begins anew."""
        slot = self.states.acquire() if self.states.is_needed else None
        if self.states.is_needed and slot is None:
            self._frames.forget(sequence)
        elif self._frames.resume(sequence, num_shared, slot):
            sequence.tenancy.state = slot
            return True
        if slot is not None:
            self.states.give_back(slot)
        return False

    def _grow(self) -> None:
        """Give every sequence the pages that its tokens need; where they run out, the last one admitted stops."""
        for sequence in list(self._running):
            while sequence in self._running and not sequence.is_long:
                if self._frames.grow(sequence, self._running):
                    break
                self._suspend(self._victims()[-1])

    def _victims(self) -> list[Sequence]:
        """Who may be suspended, the one to begin with last."""
        return [sequence for sequence in self._running if not sequence.is_long and sequence.group is None]

    def _has_room_for_logits(self, sequence: Sequence) -> bool:
        """Whether all that run, and *sequence*, may be sampled from in one sweep."""
        everyone = (*self._running, sequence)
        num_alone = sum(other.group is None and other.needs_logits for other in everyone)
        return num_alone + sum(group.num_rows for group in _groups(everyone)) <= self.limits.max_sequences

    def _has_room_for_beams(self, sequence: Sequence) -> bool:
        """Whether all searches that run, and that of *sequence*, could have what they may need at once."""
        num_pages = sum(group.num_pages for group in _groups((*self._running, sequence)))
        num_long = sum(len(self._spill.held_by(other)) for other in self._running if other.is_long)
        return num_pages + num_long <= self.pool.num_pages

    def _suspend(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._blending.release(sequence)  # its own hold on them is nobody else's
        self._frames.suspend(sequence, has_state=not self.states.is_needed or sequence.tenancy.state is not None)
        self.states.release(sequence)
        self._abandon(sequence)
        self._waiting.add(sequence)

    def _abandon(self, sequence: Sequence) -> None:
        """*sequence* does not run any more: prefixes that it was to compute are another's, or nobody's."""
        self._blending.release(sequence)
        gone, heirs = self.prefixes.abandon(sequence.prefix_keys, sequence, self._running)
        for heir, position in heirs:
            self.rewind(heir, position * self.pool.page_tokens)
        if self._store is not None:
            self._store.abandon(gone)

    def _num_cached(self, sequence: Sequence) -> int:
        if sequence.is_passage:
            return sequence.num_prompt_tokens  # before whoever waits for it
        return self.count_cached(sequence.prefix_keys) * self.pool.page_tokens

    def _admit_long(self, sequence: Sequence) -> bool:
        """Admit a sequence that does not fit the frames; False while it has to wait, and those behind it too."""
        missing = self._spill.num_frames(sequence) - self.pool.num_free
        if missing > 0:
            self.prefixes.evict(missing)
        try:
            if not self._spill.admit(sequence):
                return False
        except StorageFull as error:
            self.fail(sequence, error)
            return True
        self.states.begin(sequence)
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return True

    def _settle(self) -> None:
        """Long sequences give frames back whose pages the store has by now."""
        for sequence in [sequence for sequence in self._running if sequence.is_long]:
            try:
                if not self._spill.settle(sequence):
                    self._restart(sequence)
            except StorageFull as error:
                self.fail(sequence, error)

    def _restart(self, sequence: Sequence) -> None:
        """A long sequence lost a page: it is admitted again, with what the store has of it."""
        self._running.remove(sequence)
        self.states.release(sequence)
        self._spill.remove(sequence)
        sequence.tenancy = Tenancy()
        self._waiting.add(sequence)

    def _publish(self, sequence: Sequence, start: int) -> Published | None:
        """What of *sequence*, from token *start* on, may be stored."""
        if sequence.is_long:
            size = self.pool.page_tokens
            return self._spill.publish(sequence, start // size, sequence.num_computed // size)
        published = self.prefixes.publish(sequence.prefix_keys, sequence)
        if published is None or sequence.is_kept:
            return published
        if self._store is not None:
            self._store.abandon(published.keys)  # nobody needs to wait for them
        return None


def _groups(sequences: Iterable[Sequence]) -> set[BeamGroup]:
    return {sequence.group for sequence in sequences if sequence.group is not None}

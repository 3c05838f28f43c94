"""Decides what goes into the next sweep. Pure: it moves no tensor, reads no clock, opens no file.

Beside the sweep it decides what is to be done first about pages on disk; whoever runs the sweep does it
(``next_decision``, :mod:`layerstream.scheduling.decisions`). A store is asked for what it knows, and answers within a
moment; those who guess are asked too, and they may compute.

Who begins, and with what memory, is decided in :mod:`layerstream.scheduling.admission`; who stops, here; which rows of
those that run are in the sweep, in :mod:`layerstream.scheduling.composing`. Rules:

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

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.core.tenancy import Tenancy
from layerstream.errors import StorageFull
from layerstream.kv.pages import PagePool
from layerstream.kv.stored import Published, PublishedState, SpillStore
from layerstream.scheduling.admission import Admission
from layerstream.scheduling.blending import Recompute
from layerstream.scheduling.books import Books
from layerstream.scheduling.budget import ExpertLoad, SweepBudget
from layerstream.scheduling.composing import NO_DRAFTING, Composer, Drafting
from layerstream.scheduling.decisions import Decision, Forget, LetGo
from layerstream.scheduling.memory import Memory
from layerstream.scheduling.packing import SweepLimits
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
        self.states = States(num_slots, pool.page_tokens, stride, store)
        self._memory = memory = Memory.lay(limits, pool, store, self.states, can_swap=can_swap, recompute=recompute)
        self.prefixes = memory.prefixes
        self._books = Books()
        self._admission = Admission(self._books, memory, limits)
        self._composer = Composer(limits, self.budget, pool, self.prefixes, memory.spill, self.states, memory.blending)

    @property
    def limits(self) -> SweepLimits:
        """What sweeps keep to by now."""
        return self._composer.limits

    @property
    def num_waiting(self) -> int:
        """Sequences that were not admitted yet."""
        return len(self._books.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._books.running)

    def add(self, sequence: Sequence) -> None:
        """Let *sequence* wait for its pages. The caller made sure that the pool as a whole could hold it."""
        if not sequence.prefix_keys and not sequence.reads_all_rows:
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            sequence.prefix_keys = self.prefixes.keys_of(prompt, sequence.tenant)
        self._books.waiting.enter(sequence)
        self._books.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """*sequence* is finished, cancelled or failed: forget it and free its pages. One that is not here is left."""
        if sequence in self._books.running:
            self._books.running.remove(sequence)
            self._books.waiting.leave(sequence)
            self.states.release(sequence)
            if sequence.is_long:
                self._memory.spill.remove(sequence)
                return
            self._abandon(sequence)
            self.pool.release(sequence.pages)
            sequence.tenancy.pages = []
        elif sequence in self._books.waiting:
            self._books.waiting.remove(sequence)
            self._books.waiting.leave(sequence)
            self._memory.frames.forget(sequence)

    def reset(self) -> None:
        """Forget all sequences and prefixes, in whatever state an error left them. Frames that the store holds stay
        its own.

        Raises:
            AssertionError: pages are lost all the same.
        """
        running, waiting = self._books.running, list(self._books.waiting)
        self._books.clear()
        self.prefixes.clear()
        self._memory.spill.clear()
        self.states.reset((*running, *waiting))
        for sequence in (*running, *waiting):
            if self._memory.store is not None:
                self._memory.store.abandon(sequence.prefix_keys[sequence.num_computed // self.pool.page_tokens :])
            sequence.tenancy = Tenancy()
        undone = [decision.sequence for decision in self._memory.decisions]
        self._memory.decisions.clear()
        for sequence in dict.fromkeys((*running, *waiting, *undone)):
            self._memory.decisions.extend((Forget(sequence), LetGo(sequence)))
        held = self._memory.frames.held_by_store
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
        while rest and not (own := self._memory.frames.acquire(1, None, self._books.running)):
            if not (victims := self._victims()):
                raise StorageFull("there is no memory for one more beam: ask for fewer, or give the engine more memory")
            self._suspend(victims[-1])
        self.pool.share(shared)
        own_pages = [*shared, *(own or [])]
        child.tenancy = replace(parent.tenancy, pages=own_pages, reserve=[], slots=[], sources={}, previous=None)
        self.states.fork(child)
        self._books.running.insert(self._books.running.index(parent) + 1, child)
        self._books.waiting.enter(child)
        return (parent.pages[num_whole], child.pages[num_whole]) if own else None

    def schedule(self, drafting: Drafting = NO_DRAFTING) -> Sweep | None:
        """The next sweep, with guesses of *drafting*; ``None`` when nothing is there to run."""
        self._memory.frames.take_back_stored()
        self._settle()
        self._grow()
        self._admission.admit()
        for sequence in self._memory.beginnings.find_states(self._books.running):
            self._restart(sequence)
        self._books.waiting.tick()
        return self._composer.compose(self._books.running, drafting)

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
            self._books.waiting.serve(span.sequence, len(span))
        for sequence, moves in sweep.moves.items():
            sequence.tenancy.num_blended += sum(map(len, moves)) - sweep.staying.get(sequence, 0)
            sequence.tenancy.blended_to = moves[-1].stop
        for sequence in before:
            if sequence.is_prefilled:
                self._memory.blending.release(sequence)
        found = [self._publish(sequence, start) for sequence, start in before.items()]
        published = [item for item in found if item is not None]
        if self._memory.store is not None:
            for item in published:
                self._memory.frames.share_with_store(item.pages)
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
        self.states.lose(key, self._books.running)
        for heir, position in self.prefixes.lose(key, self._books.running):
            self.rewind(heir, position * self.pool.page_tokens)
            heir.tenancy.num_loaded -= self.pool.page_tokens
        for sequence in [s for s in self._books.running if s.is_long and key in s.prefix_keys]:
            self._restart(sequence)

    def shrink(self) -> bool:
        """A sweep did not fit the memory: from now on they carry half as much. False: they cannot carry less."""
        return self._composer.shrink()

    def next_decision(self) -> Decision | None:
        """What is to be done next, before a row is computed or a page copied; ``None``: nothing."""
        return self._memory.decisions.popleft() if self._memory.decisions else None

    def lose_kept(self, sequence: Sequence) -> None:
        """What was to be kept of *sequence* while it was suspended is not to be had: it is computed again."""
        is_running = sequence in self._books.running
        if is_running:
            self._books.running.remove(sequence)
        self._memory.frames.unmake(sequence)
        self.states.release(sequence)
        if is_running:
            self._abandon(sequence)
            self._books.waiting.add(sequence)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """*sequence* cannot go on because of *error*."""
        self._books.fail(sequence, error)

    def take_failed(self) -> list[tuple[Sequence, Exception]]:
        """Sequences that cannot go on, and why; they are still to be removed."""
        failed, self._books.failed = self._books.failed, []
        return failed

    def count_cached(self, keys: Seq[bytes]) -> int:
        """How many of the pages *keys*, from the first on, are there to begin after. Changes nothing: any thread may
        ask."""
        return self._memory.beginnings.count_cached(keys)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that the longest prompt may have, an answer of one token included."""
        return max(self.pool.num_tokens, self._memory.spill.max_prompt_tokens)

    def max_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens that a prompt of *num_prompt_tokens* and its answer may have together."""
        return max(self.pool.num_tokens, self._memory.spill.max_tokens(num_prompt_tokens))

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless pages, page tables and prefixes account for each other."""
        self._memory.check_integrity(self._books.running)
        assert not any(sequence.pages for sequence in self._books.waiting), "a waiting sequence holds pages"

    def _grow(self) -> None:
        """Give every sequence the pages that its tokens need; where they run out, the last one admitted stops."""
        for sequence in list(self._books.running):
            while sequence in self._books.running and not sequence.is_long:
                if self._memory.frames.grow(sequence, self._books.running):
                    break
                self._suspend(self._victims()[-1])

    def _victims(self) -> list[Sequence]:
        """Who may be suspended, the one to begin with last."""
        return [sequence for sequence in self._books.running if not sequence.is_long and sequence.group is None]

    def _suspend(self, sequence: Sequence) -> None:
        self._books.running.remove(sequence)
        self._memory.blending.release(sequence)  # its own hold on them is nobody else's
        self._memory.frames.suspend(sequence, has_state=not self.states.is_needed or sequence.tenancy.state is not None)
        self.states.release(sequence)
        self._abandon(sequence)
        self._books.waiting.add(sequence)

    def _abandon(self, sequence: Sequence) -> None:
        """*sequence* does not run any more: prefixes that it was to compute are another's, or nobody's."""
        self._memory.blending.release(sequence)
        gone, heirs = self.prefixes.abandon(sequence.prefix_keys, sequence, self._books.running)
        for heir, position in heirs:
            self.rewind(heir, position * self.pool.page_tokens)
        if self._memory.store is not None:
            self._memory.store.abandon(gone)

    def _settle(self) -> None:
        """Long sequences give frames back whose pages the store has by now."""
        for sequence in [sequence for sequence in self._books.running if sequence.is_long]:
            try:
                if not self._memory.spill.settle(sequence):
                    self._restart(sequence)
            except StorageFull as error:
                self.fail(sequence, error)

    def _restart(self, sequence: Sequence) -> None:
        """A long sequence lost a page: it is admitted again, with what the store has of it."""
        self._books.running.remove(sequence)
        self.states.release(sequence)
        self._memory.spill.remove(sequence)
        sequence.tenancy = Tenancy()
        self._books.waiting.add(sequence)

    def _publish(self, sequence: Sequence, start: int) -> Published | None:
        """What of *sequence*, from token *start* on, may be stored."""
        if sequence.is_long:
            size = self.pool.page_tokens
            return self._memory.spill.publish(sequence, start // size, sequence.num_computed // size)
        published = self.prefixes.publish(sequence.prefix_keys, sequence)
        if published is None or sequence.is_kept:
            return published
        if self._memory.store is not None:
            self._memory.store.abandon(published.keys)  # nobody needs to wait for them
        return None

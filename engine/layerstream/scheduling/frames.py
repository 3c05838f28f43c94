"""Memory for KV, handed out one page at a time: who gets a frame when there are few, and who gives one back.

In this order: a free frame; one of a prefix that nobody uses; one whose page is only waiting to be stored; one that a
running sequence holds for the rest of its answer and has not reached yet. When none of them is to be had, the sequence
that was admitted last is *suspended*: pages that only it holds go to disk, and when it is admitted again they come
back, so nothing that was computed is computed again. Pure: that is decided here, and carried out by others
(:mod:`layerstream.scheduling.decisions`).

Invariants: frames of a suspended sequence are free, and its tokens stay; the sequence that was admitted first is never
suspended for another one, so there is always one that goes on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from layerstream.core.sequence import Sequence
from layerstream.core.tenancy import Suspension
from layerstream.kv.pages import PagePool
from layerstream.kv.prefix import PrefixTable
from layerstream.kv.stored import SpillStore
from layerstream.scheduling.decisions import Decision, Forget, Resume, Suspend

LOOK_AHEAD_TOKENS = 32  # room for guesses, where frames are free


class Frames:
    """Gives frames of *pool* to sequences.

    Args:
        decisions: where what is to be done is put.
        can_swap: False: suspended sequences are computed again.
    """

    def __init__(
        self,
        pool: PagePool,
        prefixes: PrefixTable,
        store: SpillStore | None,
        decisions: deque[Decision],
        *,
        can_swap: bool = False,
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._store = store
        self._decisions = decisions
        self._can_swap = can_swap
        self.held_by_store: Counter[int] = Counter()

    def acquire(self, count: int, after: int | None, running: Iterable[Sequence] = ()) -> list[int] | None:
        """*count* frames, those behind page *after* if they are free; ``None``, and no change, if there are fewer.

        Args:
            running: who may hold frames that they have not reached yet.
        """
        if count > self._pool.num_free:
            self._make_room(count, [other for other in running if not other.is_long])
        return self._pool.acquire(count, after=after)

    def share_with_store(self, pages: Seq[int]) -> None:
        """The store is going to write *pages*, and holds them until then."""
        self._pool.share(list(pages))
        self.held_by_store.update(pages)

    def take_back_stored(self) -> None:
        """Release what the store is done with."""
        if self._store is not None:
            self._release(self._store.collect())

    def grow(self, sequence: Sequence, running: Seq[Sequence]) -> bool:
        """Make sure that all known tokens of *sequence* have a page; False if there are not enough frames."""
        missing = self._pool.pages_for(sequence.num_tokens) - len(sequence.pages)
        if missing > 0:
            own = self.acquire(missing, sequence.pages[-1], [other for other in running if other is not sequence])
            if own is None:
                return False
            sequence.tenancy.pages += own
        wanted = min(sequence.num_tokens + LOOK_AHEAD_TOKENS, sequence.max_num_tokens)
        more = self._pool.pages_for(wanted) - len(sequence.pages)
        if 0 < more <= self._pool.num_free - len(running):
            sequence.tenancy.pages += self._pool.acquire(more, after=sequence.pages[-1]) or []
        return True

    def suspend(self, sequence: Sequence, *, has_state: bool = True) -> None:
        """Free the frames of *sequence*, which stops running; what only it holds goes to disk.

        Args:
            has_state: False: it waits for states of recurrent layers, without which its pages are of no use.
        """
        num_shared = self._num_held_by_others(sequence)
        own = sequence.pages[num_shared : self._pool.pages_for(sequence.num_computed)]
        is_kept = self._can_swap and has_state and bool(own) and not self._prefixes.loads(sequence.prefix_keys)
        if is_kept:
            self._decisions.append(Suspend(sequence, tuple(own), sequence.tenancy.state))
        sequence.tenancy.suspension = Suspension(sequence.num_computed, num_shared, len(own), is_kept)
        self._free(sequence)

    def unmake(self, sequence: Sequence) -> None:
        """Nothing is kept of *sequence*, whether it waits or, as it was resumed in vain, stops running."""
        sequence.tenancy.suspension = Suspension(num_computed=0, num_shared=0, num_pages=0, is_kept=False)
        self._free(sequence)

    def resume(self, sequence: Sequence, num_shared: int, slot: int | None) -> bool:
        """Bring back what :meth:`suspend` kept into the pages of *sequence*, whose first *num_shared* are others', and
        its states into *slot*, if there are recurrent layers.

        Returns:
            False if that is not all that it had computed: it goes on from what is there.
        """
        suspension = sequence.tenancy.suspension
        if suspension is None or not suspension.is_kept or num_shared < suspension.num_shared:
            self.forget(sequence)
            return False
        first, stop = num_shared - suspension.num_shared, suspension.num_shared + suspension.num_pages
        self._decisions.append(Resume(sequence, first, tuple(sequence.pages[num_shared:stop]), slot))
        sequence.tenancy.num_computed, sequence.tenancy.suspension = suspension.num_computed, None
        return True

    def forget(self, sequence: Sequence) -> None:
        """What :meth:`suspend` kept of *sequence* is not wanted any more."""
        suspension, sequence.tenancy.suspension = sequence.tenancy.suspension, None
        if suspension is not None and suspension.is_kept:
            self._decisions.append(Forget(sequence))

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.tenancy.pages = []

    def _num_held_by_others(self, sequence: Sequence) -> int:
        """Pages at the beginning of *sequence* that another sequence holds too."""
        in_table = set(self._prefixes.held_pages())
        count = 0
        for page in sequence.pages:
            if self._pool.refcount(page) - (page in in_table) - self.held_by_store[page] < 2:
                break
            count += 1
        return count

    def _make_room(self, count: int, running: Seq[Sequence]) -> None:
        missing = count - self._pool.num_free
        if self._store is not None and self._prefixes.count_idle(missing) < missing:
            self._release(self._store.give_back())
        missing = count - self._pool.num_free
        unreached = {other: len(other.pages) - self._pool.pages_for(other.num_tokens + 1) for other in running}
        if self._prefixes.count_idle(missing) + sum(max(0, spare) for spare in unreached.values()) < missing:
            return
        self._prefixes.evict(missing)
        for other, spare in unreached.items():
            missing = count - self._pool.num_free
            if spare > 0 and missing > 0:
                cut = len(other.pages) - min(spare, missing)
                self._pool.release(other.pages[cut:])
                del other.tenancy.pages[cut:]

    def _release(self, pages: list[int]) -> None:
        """The store does not hold *pages* any more."""
        self.held_by_store.subtract(pages)
        for page in pages:
            if not self.held_by_store[page]:
                del self.held_by_store[page]
        self._pool.release(pages)

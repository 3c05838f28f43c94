"""Which pages hold which prefixes, so that no prefix is computed twice: pure accounting, no tensors.

A page is known by its key (:mod:`layerstream.kv.keys`), which says all tokens from position 0 on. Only whole pages of a
prompt, computed as prefill, are entered; what decoding wrote never is.

A page is what is shared, and smaller than a *chunk*, what attends together: a sequence that begins behind shared pages
may begin inside a chunk, and its rows have the bits that they would have had if all of it had been computed
(:mod:`layerstream.model.attention`).

States of an entry, and who holds its page:

| state | page held by | next |
|---|---|---|
| *pending*: ``owner`` will compute it | the owner and whoever shares it | ready, when the owner's rows are committed |
| *stored*: the next sweep that needs it loads it | whoever shares it | ready, with its commit; pending, if it is lost |
| *ready*: its KV is there | the table, and whoever shares it | gone, when evicted |

Invariants:

* an entry's parent is in the table (or there is none), so every chain starts at position 0;
* the owner of a pending entry is running and has its page at the entry's position; when it goes, the next sharer in
  order of admission becomes the owner and starts there; with no sharer the entry goes too;
* a stored entry has a sharer; when the last one goes, so does the entry;
* where an entry is ready, the KV of all before it is there as well: whoever computed it has attended to that;
* only a ready entry that nobody but the table holds, and that is no entry's parent, is evicted: least recently used
  first;
* every ready entry that is no parent is in a heap, by when it was used at some time: an entry that was used since comes
  up too early and is put back, one that has become a parent is dropped and comes again when its last child goes. So an
  eviction looks at few entries, however many there are.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sweep import PageLoad
from layerstream.kv.keys import Key, page_keys
from layerstream.kv.pages import PagePool
from layerstream.kv.stored import Published


class Inherited(NamedTuple):
    """A pending page whose owner is another one from now on, which has to compute it."""

    heir: TokenSequence
    position: int


@dataclass(slots=True)
class Entry:
    """A page of some prefix; ``position`` counts pages from 0."""

    key: Key
    parent: Key
    position: int
    page: int
    last_used: int
    owner: TokenSequence | None = None
    is_stored: bool = False
    num_children: int = 0
    is_queued: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether its KV is in the page."""
        return self.owner is None and not self.is_stored

    @property
    def is_leaf(self) -> bool:
        """Whether it may be evicted, as far as the table knows."""
        return self.is_ready and not self.num_children

    @property
    def age(self) -> tuple[int, int, Key]:
        """Its place among those that may be evicted; the least is the first to go."""
        return self.last_used, -self.position, self.key


class PrefixTable:
    """The prefixes whose pages are in *pool*."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._entries: dict[Key, Entry] = {}
        self._leaves: list[tuple[int, int, Key]] = []  # a heap of ages, at most one of each entry
        self._clock = 0
        self._num_stored = 0
        self._num_pending: Counter[TokenSequence] = Counter()  # of each owner

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """There are no prefixes; their pages are somebody else's to free."""
        self._entries, self._leaves = {}, []
        self._num_stored = 0
        self._num_pending.clear()

    def keys_of(self, token_ids: Sequence[int], tenant: str = "") -> list[Key]:
        """Keys of the pages that a prompt may share: whole ones, and never the last token, which has to be sampled."""
        return page_keys(token_ids, self._pool.page_tokens, tenant)

    def match(self, keys: Sequence[Key]) -> list[int]:
        """The pages of the longest known prefix of *keys*, in whatever state."""
        pages: list[int] = []
        self._clock += 1
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            entry.last_used = self._clock
            pages.append(entry.page)
        return pages

    def pages_of(self, keys: Sequence[Key]) -> list[int] | None:
        """The pages of *keys*, in whatever state; ``None``: not all are known. Changes nothing."""
        entries = [self._entries.get(key) for key in keys]
        return None if None in entries else [entry.page for entry in entries if entry is not None]

    def count_known(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, are known. Changes nothing, so that any thread may ask.

        Looks at few of them: who is known has a parent that is.
        """
        return bisect_left(keys, True, key=lambda key: key not in self._entries)

    def enter(self, keys: Sequence[Key], first: int, owner: TokenSequence, num_stored: int = 0) -> None:
        """Enter ``keys[first:]``, which nobody has: the first *num_stored* are loaded, *owner* computes the rest."""
        for position in range(first, len(keys)):
            parent = keys[position - 1] if position else b""
            assert keys[position] not in self._entries, "a prefix is entered once"
            is_stored = position < first + num_stored
            self._entries[keys[position]] = Entry(
                key=keys[position],
                parent=parent,
                position=position,
                page=owner.pages[position],
                last_used=self._clock,
                owner=None if is_stored else owner,
                is_stored=is_stored,
            )
            if position:
                self._entries[parent].num_children += 1
            if is_stored:
                self._num_stored += 1
            else:
                self._num_pending[owner] += 1

    def owners(self, keys: Sequence[Key], stop: int | None = None) -> list[tuple[int, TokenSequence]]:
        """``(position, owner)`` of those of *keys*, a prompt's, that are still to be computed: of the first *stop*."""
        if not self._num_pending:  # asked for every sequence in every sweep
            return []
        pending: list[tuple[int, TokenSequence]] = []
        for position in reversed(range(len(keys) if stop is None else min(stop, len(keys)))):
            entry = self._entries.get(keys[position])
            if entry is not None and entry.is_ready:
                break
            if entry is not None and entry.owner is not None:
                pending.append((entry.position, entry.owner))
        return pending

    def loads(self, keys: Iterable[Key]) -> list[PageLoad]:
        """Those of *keys* that are stored and have to be loaded, in order."""
        if not self._num_stored:
            return []
        found = (self._entries.get(key) for key in keys)
        return [PageLoad(entry.key, entry.page) for entry in found if entry is not None and entry.is_stored]

    def loaded(self, loads: Iterable[PageLoad]) -> None:
        """The pages of *loads* are in memory."""
        for load in loads:
            entry = self._entries[load.key]
            self._settle(entry)
            self._pool.share([entry.page])
            self._queue(entry)

    def publish(self, keys: Sequence[Key], owner: TokenSequence) -> Published | None:
        """The rows of *owner* up to ``owner.num_computed`` are in its pages; those that are ready since."""
        fresh: list[Entry] = []
        if owner not in self._num_pending:
            return None
        for key in keys[: owner.num_computed // self._pool.page_tokens]:
            entry = self._entries.get(key)
            if entry is not None and entry.owner is owner:
                self._settle(entry)
                self._pool.share([entry.page])
                self._queue(entry)
                fresh.append(entry)
        if not fresh:
            return None
        return Published(tuple(e.key for e in fresh), fresh[0].parent, tuple(e.page for e in fresh))

    def abandon(
        self, keys: Sequence[Key], owner: TokenSequence, others: Iterable[TokenSequence]
    ) -> tuple[list[Key], list[Inherited]]:
        """*owner* is leaving: what only it wanted goes, what it owned goes to the first of *others* that shares it.

        Returns:
            Keys that nobody is going to compute any more, and who computes the others.
        """
        entries = [entry for key in keys if (entry := self._entries.get(key)) is not None]
        heirs = list(others)
        handed_over = self._hand_over([entry for entry in entries if entry.owner is owner], heirs)
        unwanted = [entry for entry in entries if entry.is_stored and not any(_holds(heir, entry) for heir in heirs)]
        for entry in reversed(unwanted):
            self._remove(entry)
        return handed_over

    def lose(self, key: Key, running: Iterable[TokenSequence]) -> list[Inherited]:
        """The store has not got page *key* any more: it and its stored descendants are computed by who shares them.

        Returns:
            Who computes each of them.
        """
        lost = [entry for entry in self._entries.values() if entry.is_stored and self._descends(entry, key)]
        _, heirs = self._hand_over(sorted(lost, key=lambda entry: entry.position), list(running))
        return heirs

    def evict(self, count: int) -> int:
        """Free up to *count* pages of prefixes that nobody uses; how many it was."""
        freed, in_use = 0, []
        while freed < count and (entry := self._take_oldest()) is not None:
            if self._is_idle(entry):
                self._remove(entry)
                self._pool.release([entry.page])
                freed += 1
            else:
                in_use.append(entry)
        for entry in in_use:
            self._queue(entry)
        return freed

    def count_idle(self, most: int) -> int:
        """How many pages, up to *most*, :meth:`evict` could free: nobody uses them or a descendant.

        A page that is being stored is used.
        """
        count = 0
        num_children: dict[Key, int] = {}  # of parents, those that were not counted
        for _, _, key in self._leaves:
            entry = self._entries[key]
            left = entry.num_children
            while count < most and not left and self._is_idle(entry):
                count += 1
                if not entry.position:
                    break
                entry = self._entries[entry.parent]
                left = num_children[entry.key] = num_children.get(entry.key, entry.num_children) - 1
            if count == most:
                break
        return count

    def held_pages(self) -> list[int]:
        """The pages that the table itself holds."""
        return [entry.page for entry in self._entries.values() if entry.is_ready]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the invariants do not hold."""
        children: dict[Key, int] = {}
        for entry in self._entries.values():
            assert not entry.parent or entry.parent in self._entries, "an entry without its parent"
            children[entry.parent] = children.get(entry.parent, 0) + 1
            if entry.owner is not None:
                assert entry.owner.pages[entry.position] == entry.page, "an owner without the page"
                assert not entry.is_stored, "an entry that is both computed and loaded"
            if entry.is_stored:
                assert self._pool.refcount(entry.page), "a stored entry that nobody wants"
        owners = Counter(entry.owner for entry in self._entries.values() if entry.owner is not None)
        assert owners == self._num_pending, "pending entries are counted wrongly"
        assert self._num_stored == sum(entry.is_stored for entry in self._entries.values()), "so are stored ones"
        queued = {key: (last_used, place, key) for last_used, place, key in self._leaves}
        assert len(queued) == len(self._leaves), "an entry is queued twice"
        for entry in self._entries.values():
            assert entry.num_children == children.get(entry.key, 0), "children are counted wrongly"
            assert entry.is_queued == (entry.key in queued), "an entry that is queued, or is not, and does not know it"
            if entry.is_leaf:
                assert queued[entry.key] <= entry.age, "an entry that would be evicted too late"
        assert queued.keys() <= self._entries.keys(), "an entry that is gone is queued"

    def _hand_over(self, entries: Sequence[Entry], heirs: Sequence[TokenSequence]) -> tuple[list[Key], list[Inherited]]:
        """*entries*, parents first, are pending from now on and owned by the first heir that shares them, or go."""
        gone, inherited = [], []
        for entry in reversed(entries):
            heir = next((heir for heir in heirs if _holds(heir, entry)), None)
            if heir is None:
                self._remove(entry)
                gone.append(entry.key)
            else:
                self._settle(entry)
                entry.owner = heir
                self._num_pending[heir] += 1
                inherited.append(Inherited(heir, entry.position))
        return gone, inherited

    def _descends(self, entry: Entry, key: Key) -> bool:
        found: Entry | None = entry
        while found is not None:
            if found.key == key:
                return True
            found = self._entries.get(found.parent)
        return False

    def _is_idle(self, entry: Entry) -> bool:
        return entry.is_ready and self._pool.refcount(entry.page) == 1

    def _queue(self, entry: Entry) -> None:
        """*entry* may be evicted when its turn comes, if it is a leaf."""
        if entry.is_leaf and not entry.is_queued:
            entry.is_queued = True
            heapq.heappush(self._leaves, entry.age)

    def _take_oldest(self) -> Entry | None:
        """Take the leaf that was not used for longest out of the heap."""
        while self._leaves:
            age = heapq.heappop(self._leaves)
            entry = self._entries[age[2]]
            entry.is_queued = False
            if entry.is_leaf and age == entry.age:
                return entry
            self._queue(entry)
        return None

    def _settle(self, entry: Entry) -> None:
        """Nobody is to compute *entry*, or to load it, any more."""
        if entry.is_stored:
            entry.is_stored = False
            self._num_stored -= 1
        elif entry.owner is not None:
            self._num_pending[entry.owner] -= 1
            if not self._num_pending[entry.owner]:
                del self._num_pending[entry.owner]
            entry.owner = None

    def _remove(self, entry: Entry) -> None:
        """Take *entry* out of the table."""
        assert not entry.is_queued and not entry.num_children, "an entry that something leads to"
        self._settle(entry)
        del self._entries[entry.key]
        if entry.position:
            parent = self._entries[entry.parent]
            parent.num_children -= 1
            self._queue(parent)


def _holds(sequence: TokenSequence, entry: Entry) -> bool:
    return entry.position < len(sequence.pages) and sequence.pages[entry.position] == entry.page

"""Which pages hold which prefixes, so that no prefix is computed twice: pure accounting, no tensors.

A *page key* is SHA-256(parent key ‖ token ids of the page); the first page's parent is empty. Equal keys therefore
mean equal tokens from position 0 on, and the key of a page says all that its KV depends on, but for the model and its
arithmetic, which a store's namespace stands for. Only whole pages of a prompt, computed as one prefill chunk, are
entered; what decoding wrote never is.

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
* only a ready entry that nobody but the table holds, and that is no entry's parent, is evicted: least recently used
  first.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sweep import PageLoad
from layerstream.kv.pages import PagePool

Key = bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store has of a prefix: pages to load now, and pages that it is faster to compute again."""

    num_pages: int
    num_declined: int


@dataclass(frozen=True, slots=True)
class Published:
    """Consecutive pages that were just computed; ``parent`` is the key before the first.

    ``is_spilled``: their sequence goes on only when they are stored.
    """

    keys: tuple[Key, ...]
    parent: Key
    pages: tuple[int, ...]
    is_spilled: bool = False


class StoredPrefixes(Protocol):
    """What the scheduler asks of a store. Nothing here raises, or waits for a disk or another process."""

    def take(self, keys: Sequence[Key], start: int) -> Stored | None:
        """What is there of ``keys[start:]``; ``None``: not known yet, or another process is at it: ask again later."""
        ...

    def abandon(self, keys: Sequence[Key]) -> None:
        """*keys* are not going to be computed."""
        ...

    def collect(self) -> list[int]:
        """Frames that ``publish`` was given and that need not be held any longer."""
        ...

    def give_back(self) -> list[int]:
        """Frames that can be had by not storing what is in them."""
        ...


class SpillStore(StoredPrefixes, Protocol):
    """What long sequences ask of a store besides."""

    @property
    def can_spill(self) -> bool | None:
        """Whether it takes pages; ``None``: not known yet."""
        ...

    def count_stored(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, are stored as far as was seen: asked for, or written here."""
        ...

    def has_given_up(self, key: Key) -> bool:
        """Whether page *key*, whose sequence waits for it, could not be stored since it was published last."""
        ...

    def hold(self, owner: int, keys: Sequence[Key]) -> None:
        """Keep *keys* from eviction until :meth:`unhold` for the same owner."""
        ...

    def unhold(self, owner: int) -> None:
        """*owner* needs nothing any more."""
        ...


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

    @property
    def is_ready(self) -> bool:
        """Whether its KV is in the page."""
        return self.owner is None and not self.is_stored


class PrefixTable:
    """The prefixes whose pages are in *pool*."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._entries: dict[Key, Entry] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    def keys_of(self, token_ids: Sequence[int]) -> list[Key]:
        """Keys of the pages that a prompt may share: whole ones, and never the last token, which has to be sampled."""
        return page_keys(token_ids, self._pool.page_tokens)

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

    def count_known(self, keys: Sequence[Key]) -> int:
        """How many of *keys*, from the first on, are known. Changes nothing, so that any thread may ask."""
        return next((count for count, key in enumerate(keys) if key not in self._entries), len(keys))

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

    def owners(self, keys: Iterable[Key]) -> list[tuple[int, TokenSequence]]:
        """``(position, owner)`` of those of *keys* that are pending."""
        found = (self._entries.get(key) for key in keys)
        return [(entry.position, entry.owner) for entry in found if entry is not None and entry.owner is not None]

    def loads(self, keys: Iterable[Key]) -> list[PageLoad]:
        """Those of *keys* that are stored and have to be loaded, in order."""
        found = (self._entries.get(key) for key in keys)
        return [PageLoad(entry.key, entry.page) for entry in found if entry is not None and entry.is_stored]

    def loaded(self, loads: Iterable[PageLoad]) -> None:
        """The pages of *loads* are in memory."""
        for load in loads:
            entry = self._entries[load.key]
            entry.is_stored = False
            self._pool.share([entry.page])

    def publish(self, keys: Sequence[Key], owner: TokenSequence) -> Published | None:
        """The rows of *owner* up to ``owner.num_computed`` are in its pages; those that are ready since."""
        fresh: list[Entry] = []
        for key in keys[: owner.num_computed // self._pool.page_tokens]:
            entry = self._entries.get(key)
            if entry is not None and entry.owner is owner:
                entry.owner = None
                self._pool.share([entry.page])
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
        for entry in lost:
            entry.is_stored = False
        _, heirs = self._hand_over(sorted(lost, key=lambda entry: entry.position), list(running))
        return heirs

    def evict(self, count: int) -> int:
        """Free up to *count* pages of prefixes that nobody uses; how many it was."""
        idle = [self._age(entry) for entry in self._entries.values() if self._is_idle(entry)] if count > 0 else []
        heapq.heapify(idle)
        freed = 0
        while idle and freed < count:
            entry = self._entries[heapq.heappop(idle)[2]]
            self._remove(entry)
            self._pool.release([entry.page])
            freed += 1
            if entry.position and self._is_idle(parent := self._entries[entry.parent]):
                heapq.heappush(idle, self._age(parent))
        return freed

    @property
    def num_idle(self) -> int:
        """Pages that :meth:`evict` could free: nobody uses them or a descendant (a page being stored holds its own)."""
        busy: set[Key] = set()
        count = 0
        for entry in sorted(self._entries.values(), key=lambda entry: -entry.position):
            if entry.key in busy or not entry.is_ready or self._pool.refcount(entry.page) > 1:
                busy.add(entry.parent)
            else:
                count += 1
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
        for entry in self._entries.values():
            assert entry.num_children == children.get(entry.key, 0), "children are counted wrongly"

    def _hand_over(self, entries: Sequence[Entry], heirs: Sequence[TokenSequence]) -> tuple[list[Key], list[Inherited]]:
        """*entries*, parents first, are pending from now on and owned by the first heir that shares them, or go."""
        gone, inherited = [], []
        for entry in entries:
            entry.owner = next((heir for heir in heirs if _holds(heir, entry)), None)
            if entry.owner is not None:
                inherited.append(Inherited(entry.owner, entry.position))
        for entry in reversed(entries):
            if entry.owner is None:
                self._remove(entry)
                gone.append(entry.key)
        return gone, inherited

    def _descends(self, entry: Entry, key: Key) -> bool:
        found: Entry | None = entry
        while found is not None:
            if found.key == key:
                return True
            found = self._entries.get(found.parent)
        return False

    def _age(self, entry: Entry) -> tuple[int, int, Key]:
        return entry.last_used, -entry.position, entry.key

    def _is_idle(self, entry: Entry) -> bool:
        return entry.is_ready and not entry.num_children and self._pool.refcount(entry.page) == 1

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        if entry.position:
            self._entries[entry.parent].num_children -= 1


def page_keys(token_ids: Sequence[int], page_tokens: int) -> list[Key]:
    """Keys of the whole pages of *token_ids*, the last token left out."""
    keys: list[Key] = []
    parent = b""
    for start in range(0, (len(token_ids) - 1) // page_tokens * page_tokens, page_tokens):
        parent = hashlib.sha256(parent + array("q", token_ids[start : start + page_tokens]).tobytes()).digest()
        keys.append(parent)
    return keys


def _holds(sequence: TokenSequence, entry: Entry) -> bool:
    return entry.position < len(sequence.pages) and sequence.pages[entry.position] == entry.page

"""Which pages hold which prefixes, so that no prefix is computed twice: pure accounting, no tensors.

A *page key* is SHA-256(parent key ‖ token ids of the page); the first page's parent is the root. Equal keys therefore
mean equal tokens from position 0 on, and the key of a page says all that its KV depends on, but for what the root
stands for. Only whole pages of a prompt, computed as one prefill chunk, are entered; what decoding wrote never is.

States of an entry, and who holds its page:

| state | page held by | next |
|---|---|---|
| *pending*: ``owner`` will compute it | the owner and whoever shares it | ready, when the owner's rows are committed |
| *ready*: its KV is there | the table, and whoever shares it | gone, when evicted |

Invariants:

* an entry's parent is in the table (or is the root), so every chain starts at position 0;
* the owner of a pending entry is running and has its page at the entry's position; when it goes, the next sharer in
  order of admission becomes the owner and starts there; with no sharer the entry goes too;
* only a ready entry that nobody but the table holds, and that is no entry's parent, is evicted: least recently used
  first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerstream.kv.pages import PagePool
from layerstream.sequence import Sequence as TokenSequence

Key = bytes


@dataclass(slots=True)
class Entry:
    """A page of some prefix; ``position`` counts pages from 0."""

    key: Key
    parent: Key
    position: int
    page: int
    owner: TokenSequence | None
    last_used: int
    num_children: int = 0


class PrefixTable:
    """The prefixes whose pages are in *pool*."""

    def __init__(self, pool: PagePool, root: Key = b"") -> None:
        self._pool = pool
        self._root = root
        self._entries: dict[Key, Entry] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    def keys_of(self, token_ids: Sequence[int]) -> list[Key]:
        """Keys of the pages that a prompt may share: whole ones, and never the last token, which has to be sampled."""
        keys: list[Key] = []
        parent, size = self._root, self._pool.page_tokens
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            parent = hashlib.sha256(parent + array("q", token_ids[start : start + size]).tobytes()).digest()
            keys.append(parent)
        return keys

    def match(self, keys: Sequence[Key]) -> list[int]:
        """The pages of the longest known prefix of *keys*, ready or pending."""
        pages: list[int] = []
        self._clock += 1
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            entry.last_used = self._clock
            pages.append(entry.page)
        return pages

    def enter(self, keys: Sequence[Key], first: int, owner: TokenSequence) -> None:
        """*owner* is going to compute the pages of ``keys[first:]``, which nobody has yet."""
        for position in range(first, len(keys)):
            parent = keys[position - 1] if position else self._root
            assert keys[position] not in self._entries, "a prefix is entered once"
            self._entries[keys[position]] = Entry(
                keys[position], parent, position, owner.pages[position], owner, self._clock
            )
            if position:
                self._entries[parent].num_children += 1

    def owners(self, keys: Iterable[Key]) -> list[tuple[int, TokenSequence]]:
        """``(position, owner)`` of those of *keys* that are pending."""
        found = (self._entries.get(key) for key in keys)
        return [(entry.position, entry.owner) for entry in found if entry is not None and entry.owner is not None]

    def publish(self, keys: Sequence[Key], owner: TokenSequence) -> None:
        """The rows of *owner* up to ``owner.num_computed`` are in its pages."""
        for key in keys[: owner.num_computed // self._pool.page_tokens]:
            entry = self._entries.get(key)
            if entry is not None and entry.owner is owner:
                entry.owner = None
                self._pool.share([entry.page])

    def abandon(self, keys: Sequence[Key], owner: TokenSequence, others: Iterable[TokenSequence]) -> None:
        """*owner* is leaving: its pending entries go to the first of *others* that shares them, or go."""
        pending = [entry for key in keys if (entry := self._entries.get(key)) is not None and entry.owner is owner]
        heirs = list(others)
        for entry in pending:
            entry.owner = next((heir for heir in heirs if _holds(heir, entry)), None)
            if entry.owner is not None:
                start = entry.position * self._pool.page_tokens
                entry.owner.num_computed = min(entry.owner.num_computed, start)
                entry.owner.num_cached = min(entry.owner.num_cached, start)
        for entry in reversed(pending):
            if entry.owner is None:
                self._remove(entry)

    def evict(self, count: int) -> int:
        """Free up to *count* pages of prefixes that nobody uses; how many it was."""
        freed = 0
        while freed < count:
            candidates = (entry for entry in self._entries.values() if self._is_idle(entry))
            oldest = min(candidates, key=lambda entry: (entry.last_used, -entry.position), default=None)
            if oldest is None:
                break
            self._remove(oldest)
            self._pool.release([oldest.page])
            freed += 1
        return freed

    @property
    def num_idle(self) -> int:
        """Pages that :meth:`evict` could free; nobody uses a child of theirs, since its users hold them too."""
        entries = self._entries.values()
        return sum(entry.owner is None and self._pool.refcount(entry.page) == 1 for entry in entries)

    def held_pages(self) -> list[int]:
        """The pages that the table itself holds."""
        return [entry.page for entry in self._entries.values() if entry.owner is None]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the invariants do not hold."""
        children: dict[Key, int] = {}
        for entry in self._entries.values():
            assert entry.parent == self._root or entry.parent in self._entries, "an entry without its parent"
            children[entry.parent] = children.get(entry.parent, 0) + 1
            if entry.owner is not None:
                assert entry.owner.pages[entry.position] == entry.page, "an owner without the page"
        for entry in self._entries.values():
            assert entry.num_children == children.get(entry.key, 0), "children are counted wrongly"

    def _is_idle(self, entry: Entry) -> bool:
        return entry.owner is None and not entry.num_children and self._pool.refcount(entry.page) == 1

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        if entry.position:
            self._entries[entry.parent].num_children -= 1


def _holds(sequence: TokenSequence, entry: Entry) -> bool:
    return entry.position < len(sequence.pages) and sequence.pages[entry.position] == entry.page

"""Where a sequence begins: after what it shares, what is stored, and, with recurrent layers, where their states are.

A sequence shares the pages that others have computed, or are going to. What a store has beyond them is loaded. A model
with recurrent layers goes on from states, which are there at the end of some pages only
(:mod:`layerstream.scheduling.states`): it begins at the last of these, and what it shares beyond is computed once more,
into pages that hold the same bits (exact ones, where a store's codec is not).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from layerstream.core.sequence import Sequence
from layerstream.kv.keys import Key
from layerstream.kv.prefix import PrefixTable
from layerstream.kv.stored import SpillStore, Stored
from layerstream.scheduling.states import States


class Beginnings:
    """Looks at what is in memory and asks *store* for the rest."""

    def __init__(self, prefixes: PrefixTable, states: States, store: SpillStore | None, page_tokens: int) -> None:
        self._prefixes = prefixes
        self._states = states
        self._store = store
        self._page_tokens = page_tokens

    def count_cached(self, keys: Seq[Key]) -> int:
        """How many of the pages *keys*, from the first on, are there to begin after. Changes nothing: any thread may
        ask."""
        known = self._prefixes.count_known(keys)
        return self._states.resumable(keys, known) if self._states.is_needed else known

    def find(self, keys: Seq[Key], num_shared: int) -> tuple[Stored, int] | None:
        """What the store has of *keys* beyond the *num_shared* that are shared, and how many pages in all need not be
        computed; ``None``: ask again later."""
        states = self._states
        if not states.is_needed:
            if self._store is None or num_shared == len(keys):
                return Stored(0, 0), num_shared
            stored = self._store.take(keys, num_shared)
            return None if stored is None else (stored, num_shared + stored.num_pages)
        if any(position == num_shared - 1 for position, _ in self._prefixes.owners(keys, num_shared)):
            states.expect(keys[num_shared - 1])  # whoever computes that page leaves them
            return Stored(0, 0), num_shared
        resumable = states.resumable(keys, num_shared)
        stored = Stored(0, 0) if self._store is None else self._store.take(keys, num_shared, resumable)
        if stored is None:
            return None
        is_brought = stored.snapshot > 0 and states.bring(keys[stored.snapshot - 1])
        begin, known = stored.snapshot if is_brought else resumable, max(num_shared, stored.num_known)
        if known > begin:
            states.expect(keys[known - 1])  # prompts part here
        return (stored, begin) if is_brought else (Stored(0, stored.num_declined), begin)

    def find_states(self, running: Seq[Sequence]) -> list[Sequence]:
        """Whoever waits for states that nobody is going to leave begins where there are some; long ones that have to be
        admitted again for it."""
        anew: list[Sequence] = []
        for sequence in running:
            if self._states.begin(sequence) or self._states.is_coming(sequence, running):
                continue
            if sequence.is_long:
                anew.append(sequence)
                continue
            most = sequence.num_computed // self._page_tokens
            sequence.tenancy.rewind(self._states.resumable(sequence.prefix_keys, most) * self._page_tokens)
            self._states.begin(sequence)
        return anew

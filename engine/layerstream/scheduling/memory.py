"""All that sequences hold, by who hands it out. No rule is here: each part has its own.

| what | handed out by |
|---|---|
| pages of prefixes that others have computed, or are going to | ``prefixes`` |
| frames for the rest of a prompt and its answer | ``frames`` |
| slots for the states of recurrent layers | ``states`` |
| room in the store, for those that do not fit the memory | ``spill`` |
| pages of passages, while they are moved | ``blending`` |

``pool`` counts who holds which page; what is to be done about pages on disk is put into ``decisions``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from layerstream.core.sequence import Sequence
from layerstream.kv.pages import PagePool
from layerstream.kv.prefix import PrefixTable
from layerstream.kv.stored import SpillStore
from layerstream.scheduling.beginnings import Beginnings
from layerstream.scheduling.blending import Blending, Recompute
from layerstream.scheduling.decisions import Decision
from layerstream.scheduling.frames import Frames
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.spill import Spill
from layerstream.scheduling.states import States


@dataclass(frozen=True, slots=True)
class Memory:
    """What there is to hold. Make it with :meth:`lay`."""

    pool: PagePool
    store: SpillStore | None
    decisions: deque[Decision]
    states: States
    prefixes: PrefixTable
    beginnings: Beginnings
    spill: Spill
    frames: Frames
    blending: Blending

    @classmethod
    def lay(
        cls,
        limits: SweepLimits,
        pool: PagePool,
        store: SpillStore | None,
        states: States,
        *,
        can_swap: bool,
        recompute: Recompute | None,
    ) -> Memory:
        """Around *pool*, empty; the arguments are those of the scheduler."""
        decisions, prefixes = deque[Decision](), PrefixTable(pool)
        beginnings = Beginnings(prefixes, states, store, pool.page_tokens)
        num_sweep_pages = (-(-limits.max_tokens // limits.chunk_tokens) + 1) * (limits.chunk_tokens // pool.page_tokens)
        return cls(
            pool=pool,
            store=store,
            decisions=decisions,
            states=states,
            prefixes=prefixes,
            beginnings=beginnings,
            spill=Spill(pool, store, num_sweep_pages, decisions, beginnings),
            frames=Frames(pool, prefixes, store, decisions, can_swap=can_swap),
            blending=Blending(pool, prefixes, recompute or Recompute()),
        )

    def check_integrity(self, running: Seq[Sequence]) -> None:
        """Raise ``AssertionError`` unless pages, page tables and prefixes account for each other."""
        self.prefixes.check_integrity()
        held = [self.spill.held_by(s) if s.is_long else s.pages for s in running]
        sources = [pages for sequence in running for pages in sequence.tenancy.sources.values()]
        self.pool.check_integrity(
            [*held, *sources, self.prefixes.held_pages(), [*self.frames.held_by_store.elements()]]
        )
        self.states.check_integrity(running)

"""Which experts stay in memory, and which one goes when another comes. Pure.

An expert is known by its number among all experts of all layers. A *slot* holds one. Every sweep passes the layers in
the same order, so that what was used last is what is needed last again: the order of use says nothing (a cyclic scan
through an LRU cache hits next to nothing), and how often an expert is used says everything. The one that goes is
therefore the one that the smallest share of rows was routed to of late; sweeps count half as much every *half_life*
sweeps. Layers whose rows always go to the same few experts keep more of them than layers that spread: one ranking over
all layers gives each of them its share.

Invariants, checked by ``check_integrity``:

* an expert is in one slot at most, and a slot has one expert at most;
* an expert that is held (being read, or computed with) keeps its slot;
* an expert that the layer in hand wants goes only when nothing else may, and never for one that comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

HALF_LIFE = 512  # sweeps: about an answer's worth of topics, see benchmarks/LOG.md
LARGEST_USE = 1e100  # counts are scaled down before they overflow


class ExpertCache:
    """The slots, what is in them, and how much experts were used.

    Args:
        num_slots: experts that there is room for.
        num_experts: of all layers together.
        chosen: experts that a row is routed to, in all layers together.
        half_life: sweeps after which a use counts half.

    Attributes:
        hits, misses: experts that were wanted and there, or not there.
    """

    def __init__(self, num_slots: int, num_experts: int, chosen: int = 1, half_life: float = HALF_LIFE) -> None:
        self.num_slots = num_slots
        self.hits = self.misses = 0
        self._slot_of: dict[int, int] = {}
        self._expert_in = np.full(num_slots, -1)
        self._is_held = np.zeros(num_slots, bool)
        self._free = list(range(num_slots - 1, -1, -1))
        self._uses = np.zeros(num_experts)
        self._use = 1.0  # what a use counts now
        self._growth = 2.0 ** (1.0 / half_life)
        self._wanted: set[int] = set()
        self._chosen = chosen
        self._expected: dict[tuple[int, bool], tuple[float, float]] = {}  # by what was asked, for the sweep to come

    @property
    def num_experts(self) -> int:
        """Of all layers together."""
        return len(self._uses)

    def begin_sweep(self) -> None:
        """Uses from here on count a little more than those so far."""
        self._expected.clear()
        self._use *= self._growth
        if self._use > LARGEST_USE:
            self._uses /= self._use
            self._use = 1.0

    def want(self, experts: Iterable[int], shares: Sequence[float]) -> list[int]:
        """The layer in hand wants *experts*, for *shares* of its rows; those that are not there, in their order."""
        wanted = list(experts)
        self._wanted = set(wanted)
        self._uses[wanted] += self._use * np.asarray(shares)
        missing = [expert for expert in wanted if expert not in self._slot_of]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        return missing

    def is_there(self, expert: int) -> bool:
        """Whether *expert* has a slot."""
        return expert in self._slot_of

    def hold(self, expert: int) -> int:
        """The slot of *expert*, which keeps it until :meth:`let_go`."""
        slot = self._slot_of[expert]
        self._is_held[slot] = True
        return slot

    def place(self, expert: int) -> int | None:
        """A slot for *expert*, which is not there, held; ``None``: none may be taken now."""
        slot = self._free.pop() if self._free else self._find_victim(expert)
        if slot is None:
            return None
        old = int(self._expert_in[slot])
        if old >= 0:
            del self._slot_of[old]
        self._slot_of[expert] = slot
        self._expert_in[slot] = expert
        self._is_held[slot] = True
        return slot

    def let_go(self, expert: int) -> None:
        """Nobody reads or computes with *expert* any more: it stays for as long as it is worth its slot."""
        self._is_held[self._slot_of[expert]] = False
        self._wanted.discard(expert)

    def drop(self, expert: int) -> None:
        """What is in the slot of *expert* is not *expert*: its read failed."""
        slot = self._slot_of.pop(expert)
        self._expert_in[slot] = -1
        self._is_held[slot] = False
        self._free.append(slot)

    def shares(self) -> np.ndarray:
        """``(experts,)``: of late rows, the share that was routed to each expert, but for a factor that all have."""
        return self._uses / self._use

    def restore(self, shares: Sequence[float]) -> None:
        """Begin with what :meth:`shares` said in another process."""
        self._uses[:] = shares
        self._use = 1.0

    def expected(self, num_rows: int, other: ExpertCache | None = None) -> tuple[float, float]:
        """How many experts a sweep of *num_rows* is likely to want, and how many of those are not there now, nor in the
        *other* cache.

        An expert that the share *p* of rows is routed to is wanted by some of *n* with a probability of
        ``1 - (1-p)^n``, where rows choose independently.
        """
        asked = num_rows, other is not None
        if asked not in self._expected:
            total = self._uses.sum()
            if total:
                share = np.minimum(1.0, self._uses * (self._chosen / total))
            else:
                share = np.full(len(self._uses), self._chosen / len(self._uses))
            wanted = 1.0 - (1.0 - share) ** num_rows
            there = self._slot_of.keys() | (other._slot_of.keys() if other is not None else set[int]())
            self._expected[asked] = float(wanted.sum()), float(wanted.sum() - wanted[list(there)].sum())
        return self._expected[asked]

    def hottest(self, count: int) -> list[int]:
        """The *count* experts that are worth most, best first; of those that are worth the same, an even mix."""
        size = len(self._uses)
        spread = np.arange(size) * 0.6180339887498949 % 1.0  # golden ratio: any number of the first is spread evenly
        return [int(expert) for expert in np.lexsort((spread, -self._uses))[: min(count, size)]]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the parts contradict each other."""
        assert len(set(self._slot_of.values())) == len(self._slot_of), "two experts in a slot"
        for expert, slot in self._slot_of.items():
            assert self._expert_in[slot] == expert, f"slot {slot} says {self._expert_in[slot]}, not {expert}"
        assert (self._expert_in >= 0).sum() == len(self._slot_of), "a slot with an expert that nobody knows"
        assert sorted([*self._free, *self._slot_of.values()]) == list(range(self.num_slots)), "a slot was lost"
        assert not self._is_held[self._free].any(), "an empty slot is held"

    def _find_victim(self, expert: int) -> int | None:
        """The slot whose expert is worth least of those that may go for *expert*."""
        worth = self._uses[self._expert_in]
        worth[self._is_held] = np.inf
        for wanted in self._wanted:
            slot = self._slot_of.get(wanted)
            if slot is not None:
                worth[slot] = np.inf
        victim = int(worth.argmin())
        if worth[victim] < np.inf:
            return victim
        later = [other for other in self._wanted if other > expert and other in self._slot_of]
        free = [other for other in later if not self._is_held[self._slot_of[other]]]
        return self._slot_of[max(free)] if free else None

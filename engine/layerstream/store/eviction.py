"""Which segments go when the store needs room. Pure.

Leaf first: a segment that another one continues stays as long as that one does; so a snapshot, which nothing continues,
goes before its page. Among leaves the one with the lowest
priority goes; a priority is the clock at the last use plus frequency · seconds / bytes (greedy-dual-size-frequency,
Cherkasova 1998), where seconds is what computing the pages took. The clock is the highest priority evicted so far: a
number in the index, not the time of day. Pinned segments and those in use stay.

Priorities come with the candidates: the index computes them, in SQL, when a segment is written or used
(:meth:`~layerstream.store.index.Index.touch`), and moves the clock when one is removed.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment; ``parent`` is the segment that it continues, if any."""

    segment: int
    parent: int | None
    num_bytes: int
    priority: float
    pinned: bool = False


def choose_victims(candidates: Sequence[Candidate], needed_bytes: int, in_use: Collection[int] = ()) -> list[int]:
    """Segments to remove, in order, so that *needed_bytes* become free; fewer bytes if there are no more to give.

    Removing any beginning of the list leaves no segment without its parent.
    """
    by_id = {candidate.segment: candidate for candidate in candidates}
    children = Counter(candidate.parent for candidate in candidates if candidate.parent in by_id)
    leaves = [(c.priority, c.segment) for c in candidates if not children[c.segment] and _may_go(c, in_use)]
    heapq.heapify(leaves)
    victims: list[int] = []
    while needed_bytes > 0 and leaves:
        candidate = by_id[heapq.heappop(leaves)[1]]
        victims.append(candidate.segment)
        needed_bytes -= candidate.num_bytes
        parent = by_id.get(candidate.parent) if candidate.parent is not None else None
        if parent is not None:
            children[parent.segment] -= 1
            if not children[parent.segment] and _may_go(parent, in_use):
                heapq.heappush(leaves, (parent.priority, parent.segment))
    return victims


def _may_go(candidate: Candidate, in_use: Collection[int]) -> bool:
    return not candidate.pinned and candidate.segment not in in_use

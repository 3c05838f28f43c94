"""Which decode rows of a block go on at once: each row of one step from a state that an earlier step has left. Pure.

A sequence's known rows follow each other, then its guesses, depth by depth. So a block takes as many steps as its
longest sequence has rows one after the other, however many sequences are in it; a step of more rows than a device takes
at once is cut.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from layerstream.core.draft import ROOT
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep


@dataclass(frozen=True, slots=True)
class StateStep:
    """Rows that go on at once.

    Attributes:
        rows: of the block; *spans*: that they are in.
        sources: slots with the states before them; empty: they go on from the guesses that are their parents.
        targets: slots for the states after them; empty: they are guesses, whose states no slot takes.
    """

    rows: tuple[int, ...]
    spans: tuple[Span, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]


def steps_of(block: RowBlock, sweep: Sweep, most: int) -> list[StateStep]:
    """The steps of *block*, in order, each of at most *most* rows."""
    waves: defaultdict[tuple[bool, int], list[tuple[int, Span, int]]] = defaultdict(list)
    known: Counter[Sequence] = Counter()
    for first, span in block.spans_from(0):
        if span.is_drafted:
            depth = sweep.drafts[span.sequence].depths[span.node]
            waves[True, depth].append((first, span, span.start))
            continue
        for row, token in enumerate(range(span.start, span.stop), first):
            waves[False, known[span.sequence]].append((row, span, token))
            known[span.sequence] += 1
    return [_step(rows[at : at + most], sweep) for _, rows in sorted(waves.items()) for at in range(0, len(rows), most)]


def _step(rows: list[tuple[int, Span, int]], sweep: Sweep) -> StateStep:
    sources: list[int] = []
    targets: list[int] = []
    for _, span, token in rows:
        route = sweep.routes[span.sequence]
        if not span.is_drafted:
            before = route.before(token)
            assert before is not None, "a prompt came before what is generated"
            sources.append(before)
            targets.append(route.after(token + 1))
        elif sweep.drafts[span.sequence].parents[span.node] == ROOT:
            sources.append(route.target)
    return StateStep(
        tuple(row for row, _, _ in rows), tuple(span for _, span, _ in rows), tuple(sources), tuple(targets)
    )

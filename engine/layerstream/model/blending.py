"""Moves KV within the pages of a layer: out of a passage's own context, to where the passage stands in a prompt.

One :class:`Blender` is an engine's, one :class:`Blend` a sweep's. In every layer that caches, right before the first
row of a blended sequence is written, its moves are made: rows are read from the pages of the passage, what has
positions is rotated by the distance, and they are written to the sequence's own pages. A row that is computed is
written after that.

Where rows are chosen by how much they differ, nothing is moved up to the layer in which they are compared: all rows are
computed there. Their keys in that layer beside the moved ones say which stay (:mod:`layerstream.model.leaving`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch

from layerstream.core.leaving import Stays
from layerstream.core.passages import Move
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Span
from layerstream.kv.state import PagedRows
from layerstream.model.traced import Trace
from layerstream.model.turning import Turner

ROWS_AT_ONCE = 128
"""That are moved together: what they take while they are rotated fits beside a row block."""
COMPARED = 1
"""Of the layers that cache, the one in which keys are compared. In the first one they follow from token and position
alone."""


class Blender:
    """Knows how the keys of each layer that caches are moved.

    Args:
        modules: of the model, by path.
    """

    def __init__(self, trace: Trace, modules: Mapping[str, torch.nn.Module]) -> None:
        turns = [trace.layers[layer].turn for layer in trace.keepers]
        turners = {turn: Turner(turn, modules[turn.angles]) for turn in turns if turn is not None}
        self._turners = [None if turn is None else turners[turn] for turn in turns]
        self.compared = min(COMPARED, len(turns) - 1)

    def begin(self, moves: Mapping[Sequence, Seq[Move]], staying: Mapping[Sequence, int]) -> Blend:
        """For a sweep with *moves*, of whose rows some are *staying*."""
        return Blend(self, moves, staying)

    def move(self, number: int, state: PagedRows, sequence: Sequence, move: Move) -> None:
        """Make *move* in the layer that caches in *state*, the one of *number*."""
        for start in range(move.start, move.stop, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, move.stop)
            state.append(sequence.pages, start, *self.moved(number, state, move, start, stop))

    def moved(
        self, number: int, state: PagedRows, move: Move, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(heads, stop - start, width)`` of tokens ``[start, stop)``, as *move* brings them."""
        source = start - move.distance
        keys, values = state.read(list(move.pages), source, source + stop - start)
        turner = self._turners[number]
        return (keys, values) if turner is None else turner.moved(keys, values, move.distance)


class Blend:
    """The moves of a sweep, each made once in a layer."""

    def __init__(self, blender: Blender, moves: Mapping[Sequence, Seq[Move]], staying: Mapping[Sequence, int]) -> None:
        self._blender = blender
        self._moves = moves
        self._staying = staying
        self._made: set[tuple[int, Sequence]] = set()
        self._deviations: dict[Sequence, list[tuple[int, torch.Tensor]]] = {sequence: [] for sequence in staying}

    @property
    def leaves(self) -> bool:
        """Whether rows leave."""
        return bool(self._staying)

    def arrive(self, number: int, state: PagedRows, span: Span, keys: torch.Tensor) -> None:
        """*keys* ``(heads, rows, width)`` of *span* are about to be written in the layer that caches in *state*."""
        sequence = span.sequence
        if not self.moves(number, sequence):
            if sequence in self._staying and number == self._blender.compared:
                self._compare(number, state, span, keys)
        elif (number, sequence) not in self._made:
            self._made.add((number, sequence))
            moves = self._moves[sequence]
            state.clear(sequence.pages, span.start, moves[0].start)  # a chunk may see, masked, what comes later
            for move in moves:
                self._blender.move(number, state, sequence, move)

    def moves(self, number: int, sequence: Sequence) -> bool:
        """Whether rows of *sequence* are moved in the layer of *number*."""
        is_compared = sequence in self._staying and number <= self._blender.compared
        return sequence in self._moves and not is_compared

    def stays(self) -> Stays:
        """Which rows stay, after the layer in which they were compared."""
        leaving = {sequence: self._leaving(sequence, count) for sequence, count in self._staying.items()}
        return lambda sequence, position: position not in leaving.get(sequence, ())

    def _compare(self, number: int, state: PagedRows, span: Span, keys: torch.Tensor) -> None:
        """How far *keys* are from those that would be moved here: squared distances, summed over heads."""
        for move in self._moves[span.sequence]:
            start, stop = max(move.start, span.start), min(move.stop, span.stop)
            if start < stop:
                moved, _ = self._blender.moved(number, state, move, start, stop)
                difference = keys[:, start - span.start : stop - span.start].float() - moved.float()
                self._deviations[span.sequence].append((start, difference.square().sum(dim=(0, 2))))

    def _leaving(self, sequence: Sequence, num_staying: int) -> frozenset[int]:
        """Of the tokens that are moved, those that differ least."""
        found = self._deviations[sequence]
        positions = [start + at for start, deviations in found for at in range(len(deviations))]
        order = torch.cat([deviations for _, deviations in found]).argsort(stable=True)
        return frozenset(positions[at] for at in order[: max(0, len(positions) - num_staying)].tolist())

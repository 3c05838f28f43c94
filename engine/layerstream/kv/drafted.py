"""Keys and values of guesses, where the processor computes: kept beside the pages until it is known which were right.

Guesses that compete for a position cannot all be in the pages. So they wait here, layer by layer, and whoever attends
from one of them first puts the guesses on its path where the pages will have them. Whatever that leaves behind in the
pages lies past ``num_computed``, where nothing is read that was not written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from layerstream.core.draft import DraftTree
from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sweep import Span
from layerstream.kv.state import LayerState


class DraftedRows:
    """The guesses of one sweep."""

    def __init__(self, drafts: Mapping[TokenSequence, DraftTree]) -> None:
        self._drafts = drafts
        self._rows: dict[tuple[int, TokenSequence], tuple[torch.Tensor, torch.Tensor]] = {}

    def put(self, layer: int, span: Span, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep ``(heads, width)`` of the guess *span*."""
        tensors = self._rows.get((layer, span.sequence))
        if tensors is None:
            count = len(self._drafts[span.sequence])
            tensors = keys.new_empty((count, *keys.shape)), values.new_empty((count, *values.shape))
            self._rows[layer, span.sequence] = tensors
        tensors[0][span.node], tensors[1][span.node] = keys, values

    def place(
        self, layer: int, span: Span, keys: torch.Tensor, values: torch.Tensor, first: int, placed: Sequence[int]
    ) -> tuple[int, ...]:
        """Put the path of *span* into ``keys`` and ``values`` ``(heads, L, width)``, whose columns begin at *first*.

        Args:
            placed: the path that is there already.

        Returns:
            The path.
        """
        tree = self._drafts[span.sequence]
        path = tree.paths[span.node]
        same = next((at for at, (a, b) in enumerate(zip(path, placed, strict=False)) if a != b), len(placed))
        root = span.start - tree.depths[span.node]
        fresh = [node for at, node in enumerate(path) if at >= same and root + 1 + at >= first]
        if fresh:
            start = root + tree.depths[fresh[0]] - first
            columns = slice(start, start + len(fresh))
            all_keys, all_values = self._rows[layer, span.sequence]
            keys[:, columns] = all_keys[fresh].transpose(0, 1)
            values[:, columns] = all_values[fresh].transpose(0, 1)
        return path

    def accept(self, states: Sequence[LayerState], sequence: TokenSequence, nodes: Sequence[int], start: int) -> None:
        """Write the guesses *nodes* of *sequence*, a path, to its pages in host memory from position *start* on."""
        for layer, state in enumerate(states):
            if (layer, sequence) in self._rows:
                keys, values = (tensor[nodes].transpose(0, 1) for tensor in self._rows[layer, sequence])
                state.append(sequence.pages, start, keys, values)

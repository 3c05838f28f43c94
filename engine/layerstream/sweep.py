"""A :class:`Sweep`: the rows that one pass over all layers carries, cut into row blocks of fixed shape.

A row's bits depend on the shape a kernel is called with, not on what the other rows hold (design: "fixed row
blocks"). So everything that computes rows does it one :class:`RowBlock` after the other, and a block's shape
follows from its own rows alone: a prompt's chunk counted from position 0, its remainder, or a block of decode
rows padded to a constant. A request's answer then does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from layerstream.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``[start, stop)`` of one sequence, as neighbouring rows."""

    sequence: Sequence
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows computed together: spans, then padding up to ``num_rows``."""

    spans: tuple[Span, ...]
    num_rows: int

    @property
    def num_padding(self) -> int:
        """Rows at the end that belong to nobody."""
        return self.num_rows - sum(map(len, self.spans))


@dataclass(frozen=True, slots=True)
class PageLoad:
    """A page whose KV lies on disk under *key* and is brought to frame *page* while the sweep goes on."""

    key: bytes
    page: int


@dataclass(frozen=True)
class Sweep:
    """Row blocks in order, the sequences whose last row is to be sampled, and the stored pages that the rows need.

    A sequence appears in ``sampled`` exactly when its last known token is among the rows.
    """

    blocks: tuple[RowBlock, ...]
    sampled: tuple[Sequence, ...]
    loads: tuple[PageLoad, ...] = ()

    @cached_property
    def num_rows(self) -> int:
        """Rows of all blocks, padding included."""
        return sum(block.num_rows for block in self.blocks)

    @cached_property
    def num_tokens(self) -> int:
        """Rows that belong to a sequence."""
        return sum(len(span) for block in self.blocks for span in block.spans)

    @cached_property
    def sampled_rows(self) -> tuple[int, ...]:
        """The packed row of each sampled sequence's last token, in the order of ``sampled``."""
        last = {id(span.sequence): row + len(span) - 1 for row, span in self.spans()}
        return tuple(last[id(sequence)] for sequence in self.sampled)

    def spans(self) -> Iterator[tuple[int, Span]]:
        """Every span with the packed row that it starts at."""
        row = 0
        for block in self.blocks:
            at = row
            for span in block.spans:
                yield at, span
                at += len(span)
            row += block.num_rows

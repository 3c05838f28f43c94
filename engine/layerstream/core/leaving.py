"""Row blocks once some of their rows have left a sweep: the same shapes, fewer of them. Pure.

Rows of others keep their order, and a row that has to be there before another one (a passage before the prompt that it
is moved to, a chunk before the next one) still is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span

Stays = Callable[[Sequence, int], bool]
"""Whether the row of a token of a sequence stays."""


@dataclass(slots=True)
class _Filling:
    num_rows: int
    is_prompt: bool
    spans: list[Span] = field(default_factory=list[Span])
    rows: list[int] = field(default_factory=list[int])


def blocks_without(blocks: Seq[RowBlock], stays: Stays) -> tuple[list[RowBlock], list[int]]:
    """*blocks* with those rows alone that stay, and for each of their rows, padding too, the row that it was before.

    Only rows of prompts leave. Their blocks are filled in order; a block that was not full keeps its own size where
    blocks have no fixed one.
    """
    found: list[_Filling] = []
    row = 0
    for block in blocks:
        if not block.is_prompt:
            rows = list(range(row, row + block.num_rows))
            found.append(_Filling(block.num_rows, is_prompt=False, spans=list(block.spans), rows=rows))
        else:
            for at, span in block.spans_from(row):
                for part in _staying(span, stays):
                    _fill(found, block, part, at + part.start - span.start)
        row += block.num_rows
    rows = [row for each in found for row in _padded(each)]
    return [RowBlock(tuple(each.spans), each.num_rows) for each in found], rows


def _fill(found: list[_Filling], block: RowBlock, span: Span, row: int) -> None:
    last = found[-1] if found and found[-1].is_prompt else None
    if last is None or len(span) > last.num_rows - len(last.rows):
        found.append(_Filling(max(block.num_rows, len(span)), is_prompt=True))
    found[-1].spans.append(span)
    found[-1].rows += range(row, row + len(span))


def _staying(span: Span, stays: Stays) -> Iterator[Span]:
    """The parts of *span* that stay, neighbours together."""
    start = None
    for position in range(span.start, span.stop + 1):
        if position < span.stop and stays(span.sequence, position):
            start = position if start is None else start
        elif start is not None:
            yield Span(span.sequence, start, position)
            start = None


def _padded(filling: _Filling) -> list[int]:
    """Any row does for padding: nobody reads what comes of it."""
    missing = filling.num_rows - len(filling.rows)
    return [*filling.rows, *(filling.rows[:1] * missing)]

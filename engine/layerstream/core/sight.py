"""What a layer lets a row see of the rows before it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sight:
    """A row sees itself and those before it: all of them, a *window* of so many positions (its own included), or those
    of its own *chunk* of so many."""

    window: int | None = None
    chunk: int | None = None

    def first(self, position: int) -> int:
        """First position that the row at *position* sees."""
        first = 0
        if self.window is not None:
            first = max(first, position - self.window + 1)
        if self.chunk is not None:
            first = max(first, position // self.chunk * self.chunk)
        return first

    def parts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows ``[start, stop)`` in pieces of which each lies in one chunk."""
        if self.chunk is None:
            return [(start, stop)]
        borders = range(start // self.chunk * self.chunk + self.chunk, stop, self.chunk)
        cuts = [start, *borders, stop]
        return list(itertools.pairwise(cuts))

"""The memory that weights flow through.

:class:`RingAllocator` (pure) hands out intervals of a fixed range. Invariants, checked by ``check_integrity``:

* live intervals never overlap and lie inside ``[0, capacity)``;
* each is a multiple of a page long and starts on a page (direct I/O needs that);
* intervals are released in any order; an empty ring grants any request up to its capacity.
"""

from __future__ import annotations

from layerstream.core.sizes import PAGE


class RingAllocator:
    """Intervals of ``[0, capacity)``, granted at a cursor that goes round.

    | call | who | effect |
    |---|---|---|
    | ``acquire(n)`` | the streamer, before it reads a unit | an offset, or ``None`` while there is no room |
    | ``release(offset)`` | the streamer, after the unit was computed | the interval is free again |
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // PAGE * PAGE
        self._live: dict[int, int] = {}  # offset -> length
        self._cursor = 0

    def acquire(self, num_bytes: int) -> int | None:
        """Offset of a free interval of *num_bytes* (rounded up to pages), or ``None`` while nothing fits."""
        length = -(-num_bytes // PAGE) * PAGE
        if not self._live:
            self._cursor = 0
        for offset in (self._cursor, 0):
            if offset + length <= self.capacity and self._is_free(offset, offset + length):
                self._live[offset] = length
                self._cursor = offset + length
                return offset
        return None

    def release(self, offset: int) -> None:
        """Give the interval at *offset* back."""
        del self._live[offset]

    @property
    def live_bytes(self) -> int:
        """Bytes granted at the moment."""
        return sum(self._live.values())

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where an invariant of the module docstring does not hold."""
        end = 0
        for offset, length in sorted(self._live.items()):
            assert offset % PAGE == 0 and length % PAGE == 0 and length > 0, (offset, length)
            assert offset >= end, f"interval at {offset} overlaps the one before it"
            end = offset + length
        assert end <= self.capacity, f"interval ends at {end}, past {self.capacity}"

    def _is_free(self, start: int, stop: int) -> bool:
        return all(stop <= offset or start >= offset + length for offset, length in self._live.items())

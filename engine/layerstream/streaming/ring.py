"""The memory that weights flow through.

:class:`RingAllocator` (pure) hands out intervals of a fixed range. Invariants, checked by ``check_integrity``:

* live intervals never overlap and lie inside ``[0, capacity)``;
* each is a multiple of a page long and starts on a page (direct I/O needs that);
* intervals are released in any order; an empty ring grants any request up to its capacity.

:class:`Arena` is the memory itself: one page-aligned allocation for the life of the engine.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

from layerstream.streaming.residency import PAGE

POPULATED_AT_ONCE = 8 * 2**20
_MADV_POPULATE_WRITE = 23
HUGE = 4 * 2**20  # below this, rounding up to 2 MiB pages would cost more than it saves


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


class Arena:
    """Page-aligned host memory, touched only where it is written.

    Attributes:
        view: the bytes, for ``readv``.
        tensor: the same bytes as a ``(num_bytes,)`` uint8 tensor, for parameters that are views into it.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(PAGE, -(-num_bytes // PAGE) * PAGE)
        memory = mmap.mmap(-1, self.num_bytes)
        if self.num_bytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memory
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def populate(self) -> None:
        """Have the system back all of it with memory now, where it can be asked to; what is there already stays."""
        for start in range(0, self.num_bytes, POPULATED_AT_ONCE):  # so that other threads' page faults are not held up
            with contextlib.suppress(OSError, ValueError, AttributeError):  # before Linux 5.14, or another system
                self._memory.madvise(_MADV_POPULATE_WRITE, start, min(POPULATED_AT_ONCE, self.num_bytes - start))

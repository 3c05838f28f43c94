"""Brings units into the ring in the order in which they will be needed, ahead of the compute.

Who owns what:

| thing | owner | until |
|---|---|---|
| ring interval of a unit | the slot in ``_slots`` | ``release`` of that unit, or ``abort`` |
| a running read | its slot; the interval is not released before ``pending`` is 0 | the reader's callback |
| the views handed out by ``acquire`` | the caller | ``release``; then the bytes are overwritten |

Invariants:

* one consumer thread calls ``begin``, ``acquire``, ``release``, ``end``, ``abort``; reader threads only run callbacks;
* units enter the ring in the order of the schedule, so the unit that ``acquire`` waits for is always granted room
  next: the ring holds at least the largest unit, and the consumer holds at most one unit while it waits;
* while the consumer is inside a sweep's last units, the first units of the next sweep are already being read
  (``cycle``: what every sweep begins with); those of the first sweep by ``read_ahead``;
* a schedule that the model does not follow is learned once, in the first sweep, by fetching on demand; afterwards a
  mismatch raises :class:`ScheduleMismatch`: an error, not a hang.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerstream.errors import LayerStreamError
from layerstream.streaming.reader import DirectReader
from layerstream.streaming.ring import Arena, RingAllocator
from layerstream.streaming.unit import UnitLayout


class ScheduleMismatch(LayerStreamError):
    """The model asked for another unit than the schedule says; it changes its path from sweep to sweep."""


@dataclass(slots=True)
class _Slot:
    """A unit in the ring."""

    offset: int
    pending: int
    error: Exception | None = None


class Streamer:
    """Streams the units of *layouts* through a ring of *ring_bytes*.

    Args:
        layouts: the streamed units in the order they are expected in.
        num_cycle: how many of them every sweep begins with (all but the head's, which only sampling sweeps need).
    """

    def __init__(self, layouts: Sequence[UnitLayout], num_cycle: int, ring_bytes: int, reader: DirectReader) -> None:
        largest = max(layout.num_bytes for layout in layouts)
        if largest > ring_bytes:
            raise ValueError(f"a ring of {ring_bytes} bytes cannot hold the largest unit of {largest}")
        self._layouts = layouts
        self._reader = reader
        self._arena = Arena(ring_bytes)
        self._ring = RingAllocator(self._arena.num_bytes)
        self._cycle = list(range(num_cycle))
        self._tail = list(range(num_cycle, len(layouts)))
        self._has_begun = False
        self._is_confirmed = False
        self._changed = threading.Condition()
        self._slots: dict[int, _Slot] = {}
        self._queue: deque[int] = deque()  # units to bring in, in order
        self._ahead: list[int] = []  # units brought in for the sweep to come
        self._expected: deque[int] = deque()
        self._asked: list[int] = []
        self._interrupt: Exception | None = None
        self.streamed_bytes = 0
        self.wait_seconds = 0.0

    @property
    def layouts(self) -> Sequence[UnitLayout]:
        """The streamed units, in the order they were given."""
        return self._layouts

    @property
    def ring_bytes(self) -> int:
        """Capacity of the ring."""
        return self._ring.capacity

    def populate(self) -> None:
        """Have the system back the ring with memory, in the background: touching it first would slow the reads."""
        threading.Thread(target=self._arena.populate, name="layerstream-ring", daemon=True).start()

    def read_ahead(self) -> None:
        """Start to bring in what the first sweep begins with, unless it has begun."""
        with self._changed:
            if not self._has_begun:
                self._queue.extend(self._cycle)
                self._pump()
                self._ahead = list(self._slots)

    def begin(self, *, with_tail: bool) -> None:
        """Start a sweep over the cycle and, *with_tail*, the units after it."""
        with self._changed:
            if any(slot.error for slot in self._slots.values()):
                self.abort()  # reading ahead failed; nobody needed it yet, so try again
            self._has_begun = True
            order = self._cycle + (self._tail if with_tail else [])
            self._asked = []
            self._expected = deque(order)
            self._queue = deque(order[len(self._ahead) :])
            self._queue.extend(self._cycle)  # the next sweep's beginning, as far as the ring has room
            self._ahead = []
            self._pump()

    def end(self) -> None:
        """The sweep is over; what is in the ring now belongs to the next one."""
        with self._changed:
            if not self._is_confirmed and self._asked:
                self._confirm()
            self._expected.clear()
            self._ahead = list(self._slots)

    def acquire(self, unit: int) -> dict[str, torch.Tensor]:
        """Wait until *unit* is in the ring; views of its tensors, in stored dtype and shape."""
        with self._changed:
            if self._interrupt is not None:
                raise self._interrupt
            self._asked.append(unit)
            if self._expected and self._expected[0] == unit:
                self._expected.popleft()
            elif self._is_confirmed:
                found = self._layouts[unit].name
                expected = self._layouts[self._expected[0]].name if self._expected else "the end of the sweep"
                raise ScheduleMismatch(f"the model asked for {found}; the schedule says {expected}")
            else:
                self._fetch_on_demand(unit)
            started = time.perf_counter()
            while (slot := self._slots.get(unit)) is None or (slot.pending and slot.error is None):
                if self._interrupt is not None:
                    raise self._interrupt
                self._changed.wait()
            self.wait_seconds += time.perf_counter() - started
            if slot.error is not None:
                raise slot.error
            layout = self._layouts[unit]
            self.streamed_bytes += layout.weight_bytes
            return views(layout, self._arena.tensor, slot.offset)

    def release(self, unit: int) -> None:
        """The unit was computed; its place in the ring is free for the next."""
        with self._changed:
            slot = self._slots.pop(unit)
            self._ring.release(slot.offset)
            self._pump()

    def abort(self) -> None:
        """Forget the sweep under way: wait for running reads, empty the ring."""
        with self._changed:
            self._queue.clear()
            self._expected.clear()
            self._ahead = []
            for slot in self._slots.values():
                slot.error = slot.error or LayerStreamError("aborted")
            while any(slot.pending for slot in self._slots.values()):
                self._changed.wait()
            for slot in self._slots.values():
                self._ring.release(slot.offset)
            self._slots.clear()
            self._interrupt = None

    def interrupt(self, error: Exception) -> None:
        """Make the consumer's present or next ``acquire`` raise *error* (from any thread), until ``abort``."""
        with self._changed:
            self._interrupt = error
            self._changed.notify_all()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where ring and slots contradict each other."""
        with self._changed:
            self._ring.check_integrity()
            needed = sum(self._layouts[unit].num_bytes for unit in self._slots)
            assert self._ring.live_bytes == needed, f"{self._ring.live_bytes} live bytes for {needed} of slots"

    def _pump(self) -> None:
        """Start reading queued units while the ring has room."""
        while self._queue:
            unit = self._queue[0]
            if unit in self._slots:
                return  # still in use by the sweep before; read again after its release
            layout = self._layouts[unit]
            offset = self._ring.acquire(layout.num_bytes)
            if offset is None:
                return
            self._queue.popleft()
            self._slots[unit] = slot = _Slot(offset, len(layout.requests))
            for request in layout.requests:
                self._reader.submit(
                    request, self._arena.view, offset, _Callback(self, slot), skip=lambda slot=slot: bool(slot.error)
                )

    def _fetch_on_demand(self, unit: int) -> None:
        """The schedule was wrong: from here to the end of this sweep, units come when they are asked for."""
        self._expected.clear()
        self._queue.clear()
        for other in [key for key in self._slots if key != unit]:
            slot = self._slots[other]
            slot.error = slot.error or LayerStreamError("not needed")
            while slot.pending:
                self._changed.wait()
            self._ring.release(self._slots.pop(other).offset)
        if unit not in self._slots:
            self._queue.append(unit)
            self._pump()

    def _confirm(self) -> None:
        """Take the order in which the units were asked for as the schedule."""
        tail = set(self._tail)
        self._cycle = [unit for unit in self._asked if unit not in tail]
        self._tail = [unit for unit in self._asked if unit in tail] or self._tail
        self._is_confirmed = True

    def _finish(self, slot: _Slot, error: Exception | None) -> None:
        with self._changed:
            slot.pending -= 1
            slot.error = slot.error or error
            if not slot.pending or slot.error:
                self._changed.notify_all()


class _Callback:
    """Counts a request of *slot* as done."""

    __slots__ = ("_slot", "_streamer")

    def __init__(self, streamer: Streamer, slot: _Slot) -> None:
        self._streamer = streamer
        self._slot = slot

    def __call__(self, error: Exception | None) -> None:
        self._streamer._finish(self._slot, error)


def views(layout: UnitLayout, memory: torch.Tensor, base: int) -> dict[str, torch.Tensor]:
    """The tensors of a unit that lies at byte *base* of *memory*, without a copy."""
    return {
        key: memory[base + place.offset : base + place.offset + place.num_bytes].view(place.dtype).view(place.shape)
        for key, place in layout.places.items()
    }

"""Brings units into a ring, in the order in which they are wanted, as far ahead as the ring has room.

Who owns what:

| thing | owner | until |
|---|---|---|
| ring interval of a unit | the slot in ``_slots`` | ``release`` of that unit, or ``abort`` |
| what is filling it (a read, a copy) | its slot; the interval is not released before ``pending`` is 0 | ``_finish`` |
| the memory handed out by ``take`` | the caller | ``release``; then the bytes are overwritten |

Invariants:

* one consumer thread calls ``want``, ``take``, ``release``, ``drop``, ``abort``; other threads only finish slots;
* units enter the ring in the order of the queue, so the unit that ``take`` waits for is always granted room next: the
  ring holds at least the largest unit, and whatever the consumer holds while it waits is released without it.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from layerstream.errors import LayerStreamError
from layerstream.hardware.arena import Arena, Populating
from layerstream.hardware.reader import DirectReader
from layerstream.hardware.timeline import Timeline
from layerstream.streaming.layout import UnitLayout
from layerstream.streaming.ring import RingAllocator


@dataclass(slots=True)
class Slot:
    """A unit in the ring; *pending* reads or copies are still filling it."""

    offset: int
    pending: int
    error: Exception | None = None


class Feed(ABC):
    """Units of *layouts* in a ring of *ring_bytes*; how a slot is filled is the subclass's business."""

    def __init__(self, layouts: Sequence[UnitLayout], ring_bytes: int) -> None:
        largest = max(layout.num_bytes for layout in layouts)
        if largest > ring_bytes:
            raise ValueError(f"a ring of {ring_bytes} bytes cannot hold the largest unit of {largest}")
        self.layouts = layouts
        self._waited = 0.0
        self.timeline: Timeline | None = None
        self._ring = RingAllocator(ring_bytes)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # the consumer waits for it
        self._slots: dict[int, Slot] = {}
        self._queue: deque[int] = deque()
        self._interrupt: Exception | None = None

    @property
    def ring_bytes(self) -> int:
        """Capacity of the ring."""
        return self._ring.capacity

    @property
    def wait_seconds(self) -> float:
        """How long what consumes the units has waited for them so far."""
        return self._waited

    @property
    def present(self) -> list[int]:
        """Units in the ring, in the order in which they came."""
        with self._changed:
            return list(self._slots)

    @property
    def has_failed(self) -> bool:
        """Whether a unit in the ring could not be filled."""
        with self._changed:
            return any(slot.error for slot in self._slots.values())

    @abstractmethod
    def populate(self) -> None:
        """Have the system back rings in host memory, in the background: touching them first would slow the reads."""

    def want(self, units: Iterable[int]) -> None:
        """Bring *units* in after what is wanted already, as the ring has room."""
        with self._changed:
            self._queue.extend(units)
            self._pump()

    def take(self, unit: int) -> torch.Tensor:
        """Wait until *unit* is in the ring; its memory, ``(num_bytes,)`` uint8."""
        with self._changed:
            started = time.perf_counter()
            while (slot := self._slots.get(unit)) is None or (slot.pending and slot.error is None):
                if self._interrupt is not None:
                    raise self._interrupt
                self._changed.wait()
            self._waited += time.perf_counter() - started
            if self._interrupt is not None:
                raise self._interrupt
            if slot.error is not None:
                raise slot.error
            return self._memory(slot.offset, self.layouts[unit].num_bytes)

    def is_there(self, unit: int) -> bool:
        """Whether :meth:`take` would return, or raise, at once."""
        with self._changed:
            slot = self._slots.get(unit)
            return self._interrupt is not None or (slot is not None and (not slot.pending or slot.error is not None))

    def release(self, unit: int) -> None:
        """Nobody looks at *unit* any more; its place in the ring is free for the next."""
        with self._changed:
            slot = self._slots.pop(unit)
            self._ring.release(slot.offset)
            self._pump()

    def drop(self, keep: int) -> None:
        """Forget what is wanted, and what is in the ring but for *keep*."""
        with self._changed:
            self._queue.clear()
            for unit in [unit for unit in self._slots if unit != keep]:
                slot = self._slots[unit]
                slot.error = slot.error or LayerStreamError("not needed")
                while slot.pending:
                    self._changed.wait()
                self._ring.release(self._slots.pop(unit).offset)

    def abort(self) -> None:
        """Wait for what is under way, empty the ring, forget what was wanted and any interrupt."""
        with self._changed:
            self._queue.clear()
            for slot in self._slots.values():
                slot.error = slot.error or LayerStreamError("aborted")
            while any(slot.pending for slot in self._slots.values()):
                self._changed.wait()
            for slot in self._slots.values():
                self._ring.release(slot.offset)
            self._slots.clear()
            self._interrupt = None

    def interrupt(self, error: Exception) -> None:
        """Make the consumer's present or next ``take`` raise *error* (from any thread), until ``abort``."""
        with self._changed:
            self._interrupt = error
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is wanted any more. Idempotent."""
        self.abort()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where ring and slots contradict each other."""
        with self._changed:
            self._ring.check_integrity()
            needed = sum(self.layouts[unit].num_bytes for unit in self._slots)
            assert self._ring.live_bytes == needed, f"{self._ring.live_bytes} live bytes for {needed} of slots"

    @abstractmethod
    def _memory(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Bytes ``[offset, offset + num_bytes)`` of the ring."""

    @abstractmethod
    def _fill(self, unit: int, slot: Slot) -> None:
        """Start to fill *slot*, whose ``pending`` is set here; called with the lock held."""

    def _pump(self) -> None:
        """Start to fill queued units while the ring has room."""
        while self._queue:
            unit = self._queue[0]
            if unit in self._slots:
                return  # still in use by the sweep before; brought in again after its release
            offset = self._ring.acquire(self.layouts[unit].num_bytes)
            if offset is None:
                return
            self._queue.popleft()
            self._slots[unit] = slot = Slot(offset, 0)
            self._fill(unit, slot)

    def _finish(self, slot: Slot, error: Exception | None) -> None:
        """One read or copy of *slot* is over."""
        with self._changed:
            slot.pending -= 1
            slot.error = slot.error or error
            if not slot.pending or slot.error:
                self._changed.notify_all()


class ReadFeed(Feed):
    """From files into host memory."""

    def __init__(self, layouts: Sequence[UnitLayout], ring_bytes: int, reader: DirectReader) -> None:
        super().__init__(layouts, ring_bytes)
        self.arena = Arena(self._ring.capacity)
        self._reader = reader
        self._populating: Populating | None = None

    def populate(self) -> None:
        """On a thread of its own."""
        self._populating = Populating(self.arena, "ring")

    def close(self) -> None:
        """End that thread, too. Idempotent."""
        super().close()
        if self._populating is not None:
            self._populating.close()

    def _memory(self, offset: int, num_bytes: int) -> torch.Tensor:
        return self.arena.tensor[offset : offset + num_bytes]

    def _fill(self, unit: int, slot: Slot) -> None:
        requests = self.layouts[unit].requests
        slot.pending = len(requests)
        for request in requests:
            self._reader.submit(
                request, self.arena.view, slot.offset, partial(self._finish, slot), skip=lambda: bool(slot.error)
            )

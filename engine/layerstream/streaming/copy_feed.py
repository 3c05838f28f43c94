"""From the host to the device: the second ring of the pipeline.

    disk ──reads──▶ host ring ──┐
                                ├──inward lane──▶ device ring ──compute lane──▶
    host residents ─────────────┘

Units are copied in the order in which they are wanted. The copy of what stays in host memory is queued by the consumer,
when it lets go of the place that it goes to: no thread is woken for it. From the first unit that comes from disk on, a
thread of its own, the copier, does it: it waits for the disk. Both threads share one interpreter lock, so the copier is
woken only when it has nothing to do, and the consumer only when it waits. Invariants:

* copies are queued by the copier as long as it has any to queue, else by the consumer, with the lock held;
* a copy into a place of the device ring comes after all compute that was queued before that place was released, and
  after no other, so that it goes on beside the compute that was queued since;
* compute on a unit comes after its copy: ``take`` makes the compute lane wait, never the host;
* a unit's place in the host ring is released when its copy is over, not when it is queued; while the copier has nothing
  else to do it waits for that, so that the disk never waits for a copy that is over;
* after ``abort`` the copier holds no place in the host ring.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from layerstream.errors import EngineClosed, LayerStreamError
from layerstream.hardware.device import Device, Mark
from layerstream.streaming.feed import Feed, Slot
from layerstream.streaming.host_source import HostSource
from layerstream.streaming.layout import UnitLayout


class LaneWaits:
    """How long the compute lane of *device* waits for copies; what it has not come to yet is counted later."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._waits: deque[tuple[Mark, Mark]] = deque()
        self._waited = 0.0
        self._lock = threading.Lock()

    def wait_for(self, mark: Mark) -> None:
        """Have compute that is queued from here on come after *mark*."""
        if mark.is_reached():
            return
        compute = self._device.compute
        before = compute.mark(timed=True)
        compute.after(mark)
        self._waits.append((before, compute.mark(timed=True)))

    @property
    def seconds(self) -> float:
        """So far."""
        with self._lock:  # whoever asks for statistics asks from another thread
            while self._waits and self._waits[0][1].is_reached():
                before, after = self._waits.popleft()
                self._waited += after.seconds_since(before)
            return self._waited

    def clear(self) -> None:
        """Forget what was not come to: it may never be."""
        with self._lock:
            self._waits.clear()


class CopyFeed(Feed):
    """From host memory into a ring on *device*.

    Args:
        source: where they come from.
    """

    def __init__(self, layouts: Sequence[UnitLayout], ring_bytes: int, device: Device, source: HostSource) -> None:
        super().__init__(layouts, ring_bytes)
        self._device = device
        self._source = source
        with device.use():
            self._ring_memory = device.allocate(self._ring.capacity)
            self._released = device.compute.mark()  # all compute on places that are free comes before it
        self._jobs: deque[tuple[int, Slot, Mark]] = deque()
        self._has_jobs = threading.Condition(self._lock)  # the copier waits for it
        self._copied: dict[int, Mark] = {}
        self._retiring: deque[tuple[Mark, int]] = deque()
        self._is_closed = False
        self._waits = LaneWaits(device)
        self._copier = threading.Thread(target=self._work, name="layerstream-copier", daemon=True)
        self._copier.start()

    @property
    def wait_seconds(self) -> float:
        """How long the compute lane has waited for copies."""
        return self._waits.seconds

    def populate(self) -> None:
        """Pinning has done so."""

    def want(self, units: Iterable[int]) -> None:
        """They are wanted from the host as well."""
        units = list(units)
        self._source.want(units)
        with self._device.use():  # whoever reads ahead of the first sweep does not
            super().want(units)

    def take(self, unit: int) -> torch.Tensor:
        """Once its copy is queued: compute that is queued from here on finds it there."""
        memory = super().take(unit)
        self._waits.wait_for(self._copied[unit])
        return memory

    def release(self, unit: int) -> None:
        """Compute that was queued up to here may still look at it; the next copy waits for that, not the host."""
        self._released = self._device.compute.mark()
        super().release(unit)

    def drop(self, keep: int) -> None:
        """All of it: what is half on its way is easier brought again."""
        del keep
        self._empty()

    def abort(self) -> None:
        """As every feed, and no copy is under way after it."""
        self._empty()
        with self._changed:
            self._interrupt = None

    def interrupt(self, error: Exception) -> None:
        """Wakes the copier, too, where it waits for the disk."""
        super().interrupt(error)
        self._source.interrupt(error)

    def close(self) -> None:
        """End the copier. Idempotent."""
        self.interrupt(EngineClosed("the engine was closed while it copied weights"))
        with contextlib.suppress(Exception):  # of a device that is lost
            self._empty()
        with self._changed:
            self._is_closed = True
            self._has_jobs.notify()
        self._copier.join()
        self._source.close()

    def _empty(self) -> None:
        with self._changed:
            self._queue.clear()
            for slot in self._slots.values():
                slot.error = slot.error or LayerStreamError("not needed")
        self._source.interrupt(LayerStreamError("not needed"))
        with self._changed:
            while self._jobs or self._retiring or any(slot.pending for slot in self._slots.values()):
                self._changed.wait()
            for slot in self._slots.values():
                self._ring.release(slot.offset)
            self._slots.clear()
            self._copied.clear()
            self._waits.clear()
        self._source.abort()
        with self._device.use():
            self._released = self._device.compute.mark()

    def _memory(self, offset: int, num_bytes: int) -> torch.Tensor:
        return self._ring_memory[offset : offset + num_bytes]

    def _fill(self, unit: int, slot: Slot) -> None:
        self._copied.pop(unit, None)
        if self._source.stays(unit) and not self._jobs:
            slot.error = self._try_copy(unit, slot, self._released)
            return
        slot.pending = 1
        self._jobs.append((unit, slot, self._released))
        if len(self._jobs) == 1:
            self._has_jobs.notify()

    def _work(self) -> None:
        with self._device.use():
            while (job := self._next()) is not None:
                unit, slot, free = job
                error = self._try_copy(unit, slot, free) if slot.error is None else None
                with self._changed:
                    self._jobs.popleft()
                    self._finish(slot, error)

    def _next(self) -> tuple[int, Slot, Mark] | None:
        """The unit to copy next; while there is none, copies that are over are let go of."""
        while True:
            with self._has_jobs:
                while not self._jobs and not self._retiring and not self._is_closed:
                    self._has_jobs.wait()
                if self._jobs:
                    return self._jobs[0]
                if not self._retiring:
                    return None
            self._retire_one()

    def _try_copy(self, unit: int, slot: Slot, free: Mark) -> Exception | None:
        """As :meth:`_copy`; what went wrong, for whoever waits for the unit."""
        try:
            self._copy(unit, slot, free)
        except Exception as reason:  # noqa: BLE001  # whoever waits for the unit must hear of it
            return reason
        return None

    def _copy(self, unit: int, slot: Slot, free: Mark) -> None:
        """Queue the copy of *unit* to *slot*, which compute up to *free* may still look at."""
        source, inward = self._source, self._device.inward
        is_from_disk = not source.stays(unit)
        while is_from_disk and self._retiring and self._must_retire(unit):
            self._retire_one()
        memory = source.take(unit)
        inward.after(free)
        is_timed = self.timeline is not None
        started = inward.mark(timed=True) if is_timed else None
        inward.copy(self._memory(slot.offset, len(memory)), memory)
        mark = inward.mark(timed=is_timed)
        if self.timeline is not None and started is not None:
            self.timeline.add_marks("copy", self.layouts[unit].name, started, mark, len(memory))
        self._copied[unit] = mark
        if is_from_disk:
            self._retiring.append((mark, unit))

    def _must_retire(self, unit: int) -> bool:
        """Whether the oldest copy from the host ring is over, or *unit* cannot come before it is: there is no place for
        it yet, or it is in the host ring from the sweep before and that place is about to be released."""
        return (
            self._retiring[0][0].is_reached()
            or not self._source.is_there(unit)
            or any(other == unit for _, other in self._retiring)
        )

    def _retire_one(self) -> None:
        """Wait for the oldest copy from the host ring, and let its place there be used again."""
        mark, unit = self._retiring[0]
        try:
            mark.wait()
        except Exception as error:  # noqa: BLE001  # the device is lost; whoever waits for a unit must hear of it
            super().interrupt(error)
        self._source.release(unit)
        with self._changed:
            self._retiring.popleft()
            self._changed.notify_all()

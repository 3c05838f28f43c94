"""Experts on an accelerator: slots in its memory, in front of those in host memory.

    disk ──reads──▶ host slots ──┬──inward lane──▶ device slots ──compute lane──▶
                                 └──processor (few rows)

What is on the device is computed first; meanwhile the others cross, or the processor computes them where they are, as
:mod:`layerstream.streaming.experts.paths` divides them. The device keeps the experts that are used most, and the host
those that come next: only what the device does not have is asked of it, so that it does not keep the same ones.

| thing | owner | until |
|---|---|---|
| a device slot | whoever computes with its expert, on its way or there: ``_here`` | :meth:`_release`, or ``abort`` |
| its bytes after that | compute that was queued before | the mark in ``_free``, which the next copy waits for |
| a host slot whose expert is crossing | ``_crossing`` | its copy is over |

Invariants:

* one consumer thread, the engine's; here it never waits for compute, and for a copy only where a host slot is needed;
* a copy comes after all compute with the slot's expert before, and compute with an expert after its copy;
* one device slot more than are held is left for the expert whose turn it is, so that it can always come.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from layerstream.hardware.device import Device, Mark
from layerstream.hardware.timeline import Timeline
from layerstream.planner.experts import HOST_ROWS
from layerstream.streaming.copy_feed import LaneWaits
from layerstream.streaming.experts.bank import Brought, ExpertBank, Wish
from layerstream.streaming.experts.cache import ExpertCache
from layerstream.streaming.experts.paths import ExpertPaths
from layerstream.streaming.layout import UnitLayout
from layerstream.streaming.streamer import views


class DeviceBank:
    """The experts of all layers, on *device* and behind it.

    Args:
        layout: where an expert's tensors lie in a slot, on either side.
        cache: decides what stays on the device.
        slot_bytes: room for any expert.
        host: has the others, and reads them.
        paths: what both ways take.
        computes_on_host: whether the processor may compute experts.

    Attributes:
        streamed_bytes: stored bytes of experts that crossed for sweeps so far.
        num_computed_on_host: experts that the processor computed.
    """

    def __init__(
        self,
        layout: Callable[[int], UnitLayout],
        cache: ExpertCache,
        slot_bytes: int,
        host: ExpertBank,
        device: Device,
        paths: ExpertPaths,
        *,
        computes_on_host: bool = True,
    ) -> None:
        self.cache = cache
        self.host = host
        self.streamed_bytes = 0
        self.num_computed_on_host = 0
        self._layout = layout
        self._slot_bytes = slot_bytes
        self._device = device
        self._paths = paths
        self._computes_on_host = computes_on_host
        self._timeline: Timeline | None = None
        with device.use():
            self._memory = device.allocate(cache.num_slots * slot_bytes)
            self._free = [device.compute.mark()] * cache.num_slots
        device.pin(host.arena)
        self._is_pinned = True
        self._waits = LaneWaits(device)
        self._here: set[int] = set()
        self._copied: dict[int, Mark] = {}
        self._crossing: deque[tuple[Mark, Mark, int]] = deque()

    @property
    def wait_seconds(self) -> float:
        """How long experts were waited for: by the engine's thread for the disk, by the compute lane for copies."""
        return self.host.wait_seconds + self._waits.seconds

    @property
    def crossing_seconds(self) -> float:
        """What an expert takes to the device."""
        return self._paths.ship_seconds

    @property
    def timeline(self) -> Timeline | None:
        """Told of waits and copies."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._timeline = self.host.timeline = timeline

    def load_hottest(self, on_read: Callable[[int], None]) -> None:
        """As :meth:`ExpertBank.load_hottest`: the device gets the first, the host those that come next."""
        host_slots = self.host.cache.num_slots
        ranking = self.cache.hottest(self.cache.num_slots + host_slots)
        first, later = ranking[: self.cache.num_slots], ranking[self.cache.num_slots :]
        for start in range(0, len(first), host_slots):
            some = sorted(first[start : start + host_slots])
            self.host.load(some, on_read)
            for expert in some:
                self._cross(expert)
                self._release(expert)
            self._settle()
        self._copied.clear()
        self.streamed_bytes = 0
        self.host.load(sorted(later), on_read)

    def read_ahead(self) -> None:
        """Nothing: which experts are wanted is known when they are."""

    def begin(self, *, with_tail: bool) -> None:
        """A sweep begins."""
        self.cache.begin_sweep()
        self.host.begin(with_tail=with_tail)

    def end(self) -> None:
        """The sweep is over; what is in the slots stays."""
        self._settle()
        self.host.end()

    def divide(self, wish: Wish) -> frozenset[int]:
        """Of the experts that are not on the device, those that the processor computes."""
        if not self._computes_on_host:
            return frozenset()
        missing = [expert for expert in wish.experts if not self.cache.is_there(expert)]
        chosen = self._paths.choose(wish.only(missing).rows, most_rows=max(HOST_ROWS, int(wish.num_rows)))
        return frozenset(missing[place] for place in chosen)

    def bring(self, wish: Wish, on_host: frozenset[int], may_skip: Callable[[], bool]) -> Iterator[Brought]:
        """As :class:`~layerstream.streaming.experts.bank.Bank` says."""
        self._begin_layer(wish, on_host)
        rows = dict(zip(wish.experts, wish.rows, strict=True))
        waiting = list(wish.experts)
        while waiting:
            self._cross_what_is_ready(waiting, on_host)
            expert = self._next(waiting, on_host, may_skip=may_skip())
            if expert in on_host:
                yield from self._bring_on_host(expert, rows[expert])
            else:
                yield Brought(expert, self._take(expert))
                self._release(expert)
            waiting.remove(expert)

    def expected(self, num_rows: int) -> tuple[float, float, float]:
        """How many experts a sweep of *num_rows* is likely to want, how many of those are not on the device, and how
        many nowhere in memory."""
        wanted, missing = self.cache.expected(num_rows)
        return wanted, missing, self.cache.expected(num_rows, self.host.cache)[1]

    def abort(self) -> None:
        """Wait for what is under way, forget what was wanted and any interrupt; what is there stays."""
        self.host.cancel()
        with contextlib.suppress(Exception):  # of a device that is lost
            self._settle()
        self._crossing.clear()
        self._copied.clear()
        self._waits.clear()
        self.host.abort()
        for expert in self._here:
            self.cache.let_go(expert)
        self._here.clear()
        with contextlib.suppress(Exception), self._device.use():
            self._free = [self._device.compute.mark()] * self.cache.num_slots

    def interrupt(self, error: Exception) -> None:
        """Make the present or next wait for the disk raise *error* (from any thread), until ``abort``."""
        self.host.interrupt(error)

    def close(self) -> None:
        """Wait for what is under way, and unpin. Idempotent."""
        self.abort()
        if self._is_pinned:
            self._device.unpin(self.host.arena)
            self._is_pinned = False

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the parts contradict each other."""
        self.cache.check_integrity()
        self.host.check_integrity()
        assert all(self.cache.is_there(expert) for expert in self._here), "an expert is computed with and has no slot"

    def _begin_layer(self, wish: Wish, on_host: frozenset[int]) -> None:
        """Hold what is on the device, and have the host bring the rest."""
        self._settle(only_reached=True)
        missing = self.cache.want(wish.experts, wish.shares)
        here = sorted(set(wish.experts) - set(missing))
        is_full = len(here) == self.cache.num_slots
        if is_full and not on_host.issuperset(missing):  # a slot for the others to pass through
            self.cache.drop(here[-1])
            missing = sorted([*missing, here.pop()])
            self.cache.hits -= 1
            self.cache.misses += 1
        for expert in here:
            self.cache.hold(expert)
        self._here = set(here)
        self.host.want(missing, wish.only(missing).shares)

    def _next(self, waiting: Sequence[int], on_host: frozenset[int], *, may_skip: bool) -> int:
        """Of the experts *waiting*, the one to compute now: the device's first, so that it is busy while the processor
        computes."""
        if not may_skip:
            return waiting[0]
        there = next((expert for expert in waiting if expert in self._here), None)
        if there is None:
            there = next((e for e in waiting if e in on_host and self.host.is_ready(e)), None)
        return waiting[0] if there is None else there

    def _cross_what_is_ready(self, waiting: Sequence[int], on_host: frozenset[int]) -> None:
        """Queue the copies of what the host has, in order, as far as there are slots."""
        self._settle(only_reached=True)
        wanted = [expert for expert in waiting if expert not in on_host and expert not in self._here]
        for expert in wanted:
            most = self.cache.num_slots - (expert != waiting[0])
            if len(self._here) >= most:
                return
            if self.host.is_ready(expert):
                self._cross(expert)

    def _cross(self, expert: int) -> None:
        """Queue the copy of *expert* once it is in host memory."""
        while self._crossing and (not self.host.is_ready(expert) or any(e == expert for _, _, e in self._crossing)):
            self._settle_one()
        image = self.host.take(expert)
        slot = self.cache.place(expert)
        assert slot is not None, "one is always left"
        self._here.add(expert)
        start, inward = slot * self._slot_bytes, self._device.inward
        inward.after(self._free[slot])
        began = inward.mark(timed=True)
        inward.copy(self._memory[start : start + len(image)], image)
        ended = inward.mark(timed=True)
        layout = self._layout(expert)
        if self._timeline is not None:
            self._timeline.add_marks("copy", layout.name, began, ended, len(image))
        self.streamed_bytes += layout.weight_bytes
        self._crossing.append((began, ended, expert))
        self._copied[expert] = ended

    def _take(self, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of *expert* for compute that is queued from here on."""
        if expert not in self._here:
            self._cross(expert)
        copied = self._copied.pop(expert, None)
        if copied is not None:
            self._waits.wait_for(copied)
        layout, start = self._layout(expert), self.cache.hold(expert) * self._slot_bytes
        return views(layout, self._memory[start : start + layout.num_bytes])

    def _release(self, expert: int) -> None:
        """All compute with *expert* was queued."""
        self._free[self.cache.hold(expert)] = self._device.compute.mark()
        self.cache.let_go(expert)
        self._here.discard(expert)

    def _bring_on_host(self, expert: int, num_rows: int) -> Iterator[Brought]:
        """*expert* where the processor computes it."""
        if not self.host.is_ready(expert):
            self._settle()
        tensors = self.host.tensors(expert)
        started = time.perf_counter()
        yield Brought(expert, tensors, is_on_host=True)
        self._paths.computed(num_rows, time.perf_counter() - started)
        self.num_computed_on_host += 1
        self.host.release(expert)

    def _settle(self, *, only_reached: bool = False) -> None:
        """Wait for all copies, or take those that are over, and let their host slots go."""
        while self._crossing and (not only_reached or self._crossing[0][1].is_reached()):
            self._settle_one()

    def _settle_one(self) -> None:
        began, ended, expert = self._crossing[0]
        ended.wait()
        self._crossing.popleft()
        self._paths.shipped(ended.seconds_since(began))
        self.host.release(expert)


AnyBank: TypeAlias = ExpertBank | DeviceBank

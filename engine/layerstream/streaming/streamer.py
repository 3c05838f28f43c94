"""Hands the units of a sweep to the compute, in the order in which they are needed.

The order is the schedule; a :class:`Feed` brings units into its ring ahead of it. Invariants:

* one consumer thread calls ``begin``, ``acquire``, ``release``, ``end``, ``abort``, and holds at most one unit while it
  waits for the next;
* while the consumer is inside a sweep's last units, the first units of the next sweep are already being brought
  (``cycle``: what every sweep begins with); those of the first sweep by ``read_ahead``;
* a schedule that the model does not follow is learned once, in the first sweep, by fetching on demand; afterwards a
  mismatch raises :class:`ScheduleMismatch`: an error, not a hang.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from layerstream.errors import LayerStreamError
from layerstream.hardware.timeline import Timeline
from layerstream.streaming.feed import Feed
from layerstream.streaming.layout import UnitLayout


class ScheduleMismatch(LayerStreamError):
    """The model asked for another unit than the schedule says; it changes its path from sweep to sweep."""


class Streamer:
    """Streams the units of *feed*.

    Args:
        num_cycle: how many of them every sweep begins with (all but the head's, which only sampling sweeps need).

    Attributes:
        streamed_bytes: weights that were handed out so far.
    """

    def __init__(self, feed: Feed, num_cycle: int) -> None:
        self._feed = feed
        self._cycle = list(range(num_cycle))
        self._tail = list(range(num_cycle, len(feed.layouts)))
        self._has_begun = False
        self._is_confirmed = False
        self._is_ahead = False  # whether the feed was told of the coming sweep's cycle
        self._expected: deque[int] = deque()
        self._asked: list[int] = []
        self.streamed_bytes = 0
        self._timeline: Timeline | None = None

    @property
    def layouts(self) -> Sequence[UnitLayout]:
        """The streamed units, in the order they were given."""
        return self._feed.layouts

    @property
    def feed(self) -> Feed:
        """What brings them."""
        return self._feed

    @property
    def ring_bytes(self) -> int:
        """Capacity of the ring."""
        return self._feed.ring_bytes

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited so far."""
        return self._feed.wait_seconds

    def read_ahead(self) -> None:
        """Start to bring in what the first sweep begins with, unless it has begun."""
        if not self._has_begun:
            self._feed.want(self._cycle)
            self._is_ahead = True

    def begin(self, *, with_tail: bool) -> None:
        """Start a sweep over the cycle and, *with_tail*, the units after it."""
        if self._feed.has_failed:
            self.abort()  # bringing them ahead failed; nobody needed them yet, so try again
        self._has_begun = True
        order = self._cycle + (self._tail if with_tail else [])
        self._asked = []
        self._expected = deque(order)
        self._feed.want([*order[len(self._cycle) if self._is_ahead else 0 :], *self._cycle])
        self._is_ahead = True

    def end(self) -> None:
        """The sweep is over; what is in the ring now belongs to the next one."""
        if not self._is_confirmed and self._asked:
            self._confirm()
        self._expected.clear()

    def acquire(self, unit: int) -> dict[str, torch.Tensor]:
        """Wait until *unit* is in the ring; views of its tensors, in stored dtype and shape."""
        self._asked.append(unit)
        if self._expected and self._expected[0] == unit:
            self._expected.popleft()
        elif self._is_confirmed:
            found = self.layouts[unit].name
            expected = self.layouts[self._expected[0]].name if self._expected else "the end of the sweep"
            raise ScheduleMismatch(f"the model asked for {found}; the schedule says {expected}")
        else:
            self._fetch_on_demand(unit)
        started = time.perf_counter()
        memory = self._feed.take(unit)
        layout = self.layouts[unit]
        if self._timeline is not None:
            self._timeline.add("wait", layout.name, started, time.perf_counter())
        self.streamed_bytes += layout.weight_bytes
        return views(layout, memory)

    def release(self, unit: int) -> None:
        """The unit was computed; its place in the ring is free for the next."""
        self._feed.release(unit)

    def abort(self) -> None:
        """Forget the sweep under way: wait for what is running, empty the ring."""
        self._expected.clear()
        self._is_ahead = False
        self._feed.abort()

    def record(self, timeline: Timeline | None) -> None:
        """Have *timeline* told of waits and copies; ``None``: no more."""
        self._timeline = self._feed.timeline = timeline

    def interrupt(self, error: Exception) -> None:
        """Make the consumer's present or next ``acquire`` raise *error* (from any thread), until ``abort``."""
        self._feed.interrupt(error)

    def close(self) -> None:
        """Forget everything and let go of memory that others lent. Idempotent."""
        self._feed.close()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where ring and slots contradict each other."""
        self._feed.check_integrity()

    def _fetch_on_demand(self, unit: int) -> None:
        """The schedule was wrong: from here to the end of this sweep, units come when they are asked for."""
        self._expected.clear()
        self._is_ahead = False
        self._feed.drop(keep=unit)
        if unit not in self._feed.present:
            self._feed.want([unit])

    def _confirm(self) -> None:
        """Take the order in which the units were asked for as the schedule."""
        tail = set(self._tail)
        self._cycle = [unit for unit in self._asked if unit not in tail]
        self._tail = [unit for unit in self._asked if unit in tail] or self._tail
        self._is_confirmed = True


class Source(Protocol):
    """Brings weights for sweeps: units in order, or experts on demand."""

    @property
    def streamed_bytes(self) -> int:
        """Weights that were brought for sweeps so far."""
        ...

    @property
    def wait_seconds(self) -> float:
        """How long the compute has waited for them."""
        ...

    def read_ahead(self) -> None:
        """As :meth:`Streamer.read_ahead`."""

    def begin(self, *, with_tail: bool) -> None:
        """As :meth:`Streamer.begin`."""

    def end(self) -> None:
        """As :meth:`Streamer.end`."""

    def abort(self) -> None:
        """As :meth:`Streamer.abort`."""

    def interrupt(self, error: Exception) -> None:
        """As :meth:`Streamer.interrupt`."""


class Streams:
    """All that brings weights for a sweep: what is said to all of them at once."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._all = sources

    @property
    def streamed_bytes(self) -> int:
        """Weights that were brought so far."""
        return sum(source.streamed_bytes for source in self._all)

    @property
    def wait_seconds(self) -> float:
        """How long the compute has waited so far; on devices, waits at the same time are added."""
        return sum(source.wait_seconds for source in self._all)

    def read_ahead(self) -> None:
        """As :meth:`Streamer.read_ahead`."""
        for source in self._all:
            source.read_ahead()

    def begin(self, *, with_tail: bool) -> None:
        """As :meth:`Streamer.begin`."""
        for source in self._all:
            source.begin(with_tail=with_tail)

    def end(self) -> None:
        """As :meth:`Streamer.end`."""
        for source in self._all:
            source.end()

    def abort(self) -> None:
        """As :meth:`Streamer.abort`, for all of them even where one cannot."""
        with contextlib.ExitStack() as stack:
            for source in self._all:
                stack.callback(source.abort)

    def interrupt(self, error: Exception) -> None:
        """As :meth:`Streamer.interrupt`."""
        for source in self._all:
            source.interrupt(error)


def views(layout: UnitLayout, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a unit that lies in *memory*, without a copy."""
    return {
        key: memory[place.offset : place.offset + place.num_bytes].view(place.dtype).view(place.shape)
        for key, place in layout.places.items()
    }

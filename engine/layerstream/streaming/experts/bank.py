"""Brings the experts that rows are routed to, and keeps those that are worth it.

What stays is decided by an :class:`ExpertCache`; here are the memory, the reads and the waiting. A layer's experts are
computed in the order of their numbers, because sums are made in that order, or, while the next one is still being read,
in the order in which they are there.

| thing | owner | until |
|---|---|---|
| bytes of a slot | the read that fills it, then whoever computes with it | ``let_go`` of its expert |
| a read under way | ``_reading``; its slot is held | the callback, on a reader thread |
| a slot whose read failed | ``_failed`` | the expert is asked for, or ``abort`` |

Invariants:

* one consumer thread asks for experts; reader threads only say that a read is over;
* so many experts are held at a time at most (``ahead``) that reads never wait for each other's slots, and the expert
  whose turn it is is there, is being read, or gets a slot: those before it in the order are done, and those after it
  were never put before it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch

from layerstream.hardware.arena import Arena
from layerstream.hardware.reader import DirectReader
from layerstream.hardware.timeline import Timeline
from layerstream.streaming.experts.cache import ExpertCache
from layerstream.streaming.layout import UnitLayout
from layerstream.streaming.loader import read_all
from layerstream.streaming.streamer import views

AHEAD_BYTES = 32 * 2**20  # in flight: more does not make the disk faster
DEMAND = 0  # priority of a read that the compute waits for, before what is only read ahead


@dataclass(frozen=True, slots=True)
class Wish:
    """What the rows of a sweep are routed to in one layer.

    Attributes:
        experts: ascending.
        rows: for each of them, how many rows are routed to it.
        num_rows: of the sweep.
    """

    experts: list[int]
    rows: list[int]
    num_rows: float

    @property
    def shares(self) -> list[float]:
        """Of the rows, those that are routed to each of them."""
        return [count / self.num_rows for count in self.rows]

    def only(self, experts: Sequence[int]) -> Wish:
        """The same for some of them alone."""
        places = [self.experts.index(expert) for expert in experts]
        return Wish(list(experts), [self.rows[place] for place in places], self.num_rows)


class Brought(NamedTuple):
    """An expert's tensors as they are stored, where it is to be computed: ``is_on_host``, by the processor although an
    accelerator computes the rest."""

    expert: int
    tensors: dict[str, torch.Tensor]
    is_on_host: bool = False


class ExpertLost(Exception):
    """*expert* could not be read."""

    def __init__(self, expert: int, error: Exception) -> None:
        super().__init__(str(error))
        self.expert = expert
        self.error = error


class Bank(Protocol):
    """Brings the experts that rows are routed to."""

    def divide(self, wish: Wish) -> frozenset[int]:
        """Which of the experts the processor is to compute, beside an accelerator."""
        ...

    def bring(self, wish: Wish, on_host: frozenset[int], may_skip: Callable[[], bool]) -> Iterator[Brought]:
        """Each of the experts once, its tensors valid until the next is asked for.

        Args:
            on_host: what :meth:`divide` said.
            may_skip: asked before each of them; whether another than the first of those left may come: what is there
                before what is not, what an accelerator computes before what the processor does.

        Raises:
            ExpertLost: one of them could not be read.
        """
        ...


class ExpertBank:
    """The experts of all layers, in slots.

    Args:
        layout: where an expert's tensors lie in a slot, and the reads that put them there.
        cache: decides what stays; its slots are the bank's.
        slot_bytes: room for any expert.

    Attributes:
        arena: the memory.
        streamed_bytes: stored bytes of experts that were read for sweeps so far.
        wait_seconds: how long the compute has waited for them.
    """

    crossing_seconds = 0.0  # what an expert in memory takes to where it is computed with

    def __init__(
        self, layout: Callable[[int], UnitLayout], cache: ExpertCache, slot_bytes: int, reader: DirectReader
    ) -> None:
        self.cache = cache
        self.streamed_bytes = 0
        self.wait_seconds = 0.0
        self.timeline: Timeline | None = None
        self._layout = layout
        self._slot_bytes = slot_bytes
        self._reader = reader
        self.arena = Arena(cache.num_slots * slot_bytes)
        self._ahead = max(1, min(cache.num_slots, max(2, AHEAD_BYTES // slot_bytes)))
        self._changed = threading.Condition()
        self._reading: dict[int, int] = {}  # expert -> requests that are not over
        self._failed: dict[int, Exception] = {}
        self._interrupt: Exception | None = None
        self._to_read: deque[int] = deque()
        self._held: set[int] = set()

    def load_hottest(self, on_read: Callable[[int], None]) -> None:
        """Fill the slots before the first sweep with what was used most.

        Raises:
            ReadError, TruncatedFile: as the reader does.
        """
        self.load(sorted(self.cache.hottest(self.cache.num_slots)), on_read)

    def load(self, experts: Sequence[int], on_read: Callable[[int], None]) -> None:
        """Fill slots with *experts*, none of which is there, before the first sweep.

        Raises:
            ReadError, TruncatedFile: as the reader does.
        """
        slots = [self.cache.place(expert) for expert in experts]
        starts = [slot * self._slot_bytes for slot in slots if slot is not None]
        read_all([self._layout(expert) for expert in experts], self.arena, starts, self._reader, on_read)
        for expert in experts:
            self.cache.let_go(expert)

    def read_ahead(self) -> None:
        """Nothing: which experts are wanted is known when they are."""

    def begin(self, *, with_tail: bool) -> None:
        """A sweep begins."""
        self.cache.begin_sweep()

    def end(self) -> None:
        """The sweep is over; what is in the slots stays."""

    def close(self) -> None:
        """Wait for what is under way. Idempotent."""
        self.abort()

    def divide(self, wish: Wish) -> frozenset[int]:
        """None: there is no accelerator."""
        del wish
        return frozenset()

    def bring(self, wish: Wish, on_host: frozenset[int], may_skip: Callable[[], bool]) -> Iterator[Brought]:
        """As :class:`Bank` says."""
        del on_host
        waiting = list(wish.experts)
        self.want(waiting, wish.shares)
        while waiting:
            expert = self.next(waiting, may_skip=may_skip())
            yield Brought(expert, self.tensors(expert))
            self.release(expert)
            waiting.remove(expert)

    def want(self, experts: Sequence[int], shares: Sequence[float]) -> None:
        """Begin to bring *experts* of one layer, ascending, for *shares* of its rows; each is then taken once."""
        with self._changed:
            self.cache.want(experts, shares)
            self._to_read = deque(experts)
            self._pump()

    def next(self, waiting: Sequence[int], *, may_skip: bool) -> int:
        """Of the experts *waiting* to be taken, ascending, the one to compute with now.

        Args:
            may_skip: whether it may be another one than the first, if that is not there yet.
        """
        with self._changed:
            if not self._is_ready(waiting[0]) and may_skip:
                return next((expert for expert in waiting if self._is_ready(expert)), waiting[0])
            return waiting[0]

    def take(self, expert: int) -> torch.Tensor:
        """Wait until *expert* is there; its slot's bytes, ``(num_bytes,)`` uint8, valid until :meth:`release`.

        Raises:
            ExpertLost: it could not be read; it counts as released then.
        """
        started = time.perf_counter()
        layout = self._layout(expert)
        with self._changed:
            assert self.cache.is_there(expert) or expert in self._failed, f"nobody wanted {layout.name}"
            while expert in self._reading and self._interrupt is None:
                self._changed.wait()
            if self._interrupt is not None:
                raise self._interrupt
            error = self._failed.pop(expert, None)
            if error is not None:
                self._pump()
                raise ExpertLost(expert, error) from error
            slot = self.cache.hold(expert)
            self._held.add(expert)
        stopped = time.perf_counter()
        self.wait_seconds += stopped - started
        if self.timeline is not None:
            self.timeline.add("wait", layout.name, started, stopped)
        start = slot * self._slot_bytes
        return self.arena.tensor[start : start + layout.num_bytes]

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """As :meth:`take`, the tensors as they are stored."""
        return views(self._layout(expert), self.take(expert))

    def release(self, expert: int) -> None:
        """Nobody looks at the tensors of *expert* any more."""
        with self._changed:
            self._held.discard(expert)
            self.cache.let_go(expert)
            self._pump()

    def expected(self, num_rows: int) -> tuple[float, float, float]:
        """How many experts a sweep of *num_rows* is likely to want, how many of those are not where they are computed
        with, and how many nowhere in memory, which is the same here."""
        wanted, missing = self.cache.expected(num_rows)
        return wanted, missing, missing

    def cancel(self) -> None:
        """Read nothing more of what is wanted."""
        with self._changed:
            self._to_read.clear()

    def abort(self) -> None:
        """Wait for what is under way, forget what was wanted and any interrupt; what is there stays."""
        self.cancel()
        with self._changed:
            while self._reading:
                self._changed.wait()
            for expert in self._held:
                self.cache.let_go(expert)
            self._held.clear()
            self._failed.clear()
            self._interrupt = None

    def interrupt(self, error: Exception) -> None:
        """Make the consumer's present or next ``take`` raise *error* (from any thread), until ``abort``."""
        with self._changed:
            self._interrupt = error
            self._changed.notify_all()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the parts contradict each other."""
        with self._changed:
            self.cache.check_integrity()
            assert self._reading.keys() <= self._held, "a slot is being filled that nobody holds"

    def is_ready(self, expert: int) -> bool:
        """Whether :meth:`take` would return, or raise, at once; for an expert that was wanted."""
        with self._changed:
            return self._is_ready(expert)

    def _is_ready(self, expert: int) -> bool:
        return expert in self._failed or (self.cache.is_there(expert) and expert not in self._reading)

    def _pump(self) -> None:
        """Start to read what is wanted and not there, as far ahead as is useful."""
        while self._to_read:
            expert = self._to_read[0]
            if not self.cache.is_there(expert) and (len(self._held) >= self._ahead or not self._read(expert)):
                return
            self._to_read.popleft()

    def _read(self, expert: int) -> bool:
        """Start to read *expert* into a slot; whether there was one."""
        slot = self.cache.place(expert)
        if slot is None:
            return False
        layout = self._layout(expert)
        self._held.add(expert)
        self._reading[expert] = len(layout.requests)
        self.streamed_bytes += layout.weight_bytes
        for request in layout.requests:
            self._reader.submit(
                request, self.arena.view, slot * self._slot_bytes, partial(self._finish, expert), priority=DEMAND
            )
        return True

    def _finish(self, expert: int, error: Exception | None) -> None:
        """One read of *expert* is over."""
        with self._changed:
            self._reading[expert] -= 1
            if error is not None:
                self._failed[expert] = error
            if self._reading[expert]:
                return
            del self._reading[expert]
            if expert in self._failed:
                self._held.discard(expert)
                self.cache.drop(expert)
            self._changed.notify_all()

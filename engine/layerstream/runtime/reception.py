"""Where callers' threads and the engine's meet: one lock, and everything under it.

Callers hand in, cancel and close here; the engine's thread takes out what is there, and waits for more. Nothing of a
caller's is called while the lock is held, and no call here takes longer the more answers wait. In a forked child all of
it is refused before the lock is touched (:mod:`layerstream.api.home`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from layerstream.api.bell import Bell
from layerstream.api.events import Listener
from layerstream.api.home import Home
from layerstream.api.request import Request
from layerstream.errors import DeviceLost, EngineClosed
from layerstream.runtime.answer import Answer
from layerstream.runtime.idle_work import IdleWork
from layerstream.runtime.inbox import Inbox


@dataclass(frozen=True, slots=True)
class Outside:
    """What the loop has to do with the rest.

    Attributes:
        home: where it lives.
        listener: is told what goes on; does not raise.
        max_queued: answers that may wait; ``None``: no bound.
        at_end: closes what the thread used, as the last thing that it does; does not raise.
    """

    home: Home = field(default_factory=Home)
    listener: Listener | None = None
    max_queued: int | None = None
    at_end: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class OpenGang:
    """Requests that wait for each other; ``leave()``: one of them is not going to come, do not wait for it."""

    leave: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What the loop takes out at a time.

    Attributes:
        answers: may join the next sweep.
        unwanted: are cancelled, or have run out of time, before they could.
        cancelled: whoever belongs to these requests is to leave.
        seconds: when to ask again; ``None``: when there is news.
    """

    answers: list[Answer]
    unwanted: list[Answer]
    cancelled: list[Request]
    seconds: float | None


class Reception:
    """Open until it is closed, for the reason ``end`` if it was not a caller's wish."""

    def __init__(self, home: Home, inbox: Inbox, idle_work: IdleWork | None = None) -> None:
        self.is_closing = False
        self._home = home
        self._inbox = inbox
        self._idle_work = idle_work or IdleWork(lambda: 0.0)
        self._lock = threading.Lock()
        self._news = Bell()
        self._cancelled: dict[Request, None] = {}
        self._end: EngineClosed | DeviceLost | None = None

    def check_open(self) -> None:
        """Return while requests are taken.

        Raises:
            EngineClosed, DeviceLost: the engine is closed, or came to an end, or it is another process's.
        """
        self._home.check()
        if self.is_closing:
            raise self.reason() if self._end else EngineClosed("the engine is closed; make a new LayerStream")

    def reason(self) -> EngineClosed | DeviceLost:
        """Why requests that are on their way end."""
        if self._end is None:
            return EngineClosed("the engine was closed before the answer was complete")
        again = type(self._end)(*self._end.args)  # every thread that raises it has its own
        again.__cause__ = self._end.__cause__
        return again

    def submit(self, answers: Seq[Answer], num_waiting: int) -> None:
        """Let *answers* join at the next sweep, all of them at the same one, behind *num_waiting* that have not begun.
        Idle work leaves.

        Raises:
            QueueFull: more than may wait; none of them joins.
            EngineClosed, DeviceLost: as :meth:`check_open`.
        """
        self._home.check()
        with self._telling():
            self.check_open()
            requests = dict.fromkeys(answer.request for answer in answers)
            self._inbox.put(answers, len(requests), num_waiting)
            self._cancelled.update(dict.fromkeys(self._idle_work.ask(requests)))

    def submit_if_idle(self, answers: Seq[Answer]) -> bool:
        """As :meth:`submit`, for work that nobody waits for; False: somebody asks, or may be about to."""
        self._home.check()
        with self._telling():
            self.check_open()
            if self._inbox.has_gangs or not self._idle_work.may_begin():
                return False
            requests = dict.fromkeys(answer.request for answer in answers)
            self._inbox.put(answers, len(requests))
            self._idle_work.begin(requests)
            return True

    @contextlib.contextmanager
    def gang(self, size: int, seconds: float) -> Iterator[OpenGang]:
        """Hold what arrives until *size* requests are there, or *seconds* are over."""
        self.check_open()
        with self._lock:
            gang = self._inbox.open_gang(size, seconds)

        def leave() -> None:
            self._home.check()
            with self._telling():
                self._inbox.leave_gang(gang)

        try:
            yield OpenGang(leave)
        finally:
            if self._home.is_here:
                with self._telling():
                    self._inbox.close_gang(gang)

    def cancel(self, request: Request) -> None:
        """Let *request* leave by the next sweep."""
        self._home.check()
        with self._telling():
            self._cancelled[request] = None

    def wake(self) -> None:
        """Something that was waited for may be there: the loop looks again."""
        self._news.ring()

    def close(self, end: EngineClosed | DeviceLost | None = None) -> None:
        """Take nothing any more. The first reason given is the one that counts."""
        with self._telling():
            if not self.is_closing:
                self.is_closing, self._end = True, end

    def take(self, *, is_idle: bool) -> Arrivals:
        """The engine: what there is for the next sweep."""
        self._news.still()
        with self._lock:
            cancelled, self._cancelled = list(self._cancelled), {}
            held = self._inbox.roster
            late = held.expired(time.perf_counter())
            unwanted = dict.fromkeys([*late, *(answer for request in cancelled for answer in held.of(request))])
            for answer in unwanted:
                held.remove(answer)
            answers, seconds = self._inbox.take(is_idle=is_idle)
            return Arrivals(answers, list(unwanted), cancelled, seconds)

    def wait(self, seconds: float | None) -> None:
        """The engine: until there is news, *seconds* are over (``None``: never), or one that is held is out of time."""
        with self._lock:
            deadline = self._inbox.roster.next_deadline
        if deadline is not None:
            left = deadline - time.perf_counter() + 1e-3
            seconds = left if seconds is None else min(left, seconds)
        self._news.wait(None if seconds is None else max(0.0, seconds))

    def drain(self) -> list[Answer]:
        """The engine, at its end: who was never taken in."""
        with self._lock:
            return self._inbox.roster.drain()

    @property
    def is_empty(self) -> bool:
        """Whether nobody is held."""
        return not len(self._inbox)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Within it what threads share may be changed; the loop looks at it afterwards."""
        with self._lock:
            yield
        self._news.ring()

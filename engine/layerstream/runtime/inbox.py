"""Where requests arrive and meet, so that they join the same sweep. Policy only: the engine's loop guards it.

Three things hold arrivals back, each for a bounded time: an engine that is idle waits for a moment after the first
arrival, a small part of a sweep, because who comes a millisecond later would wait for a whole sweep; an open gang
holds everybody until its members are there; and a sweep under way is never interrupted. Who runs already goes on.

What is held is the *roster* of those that were not taken in yet: who is cancelled, or has run out of time, is found
there and removed, whatever holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from layerstream.errors import QueueFull
from layerstream.runtime.answer import Answer
from layerstream.runtime.roster import Roster


@dataclass(eq=False, slots=True)
class Gang:
    """*size* requests that should share their sweeps; whoever is late after *deadline* is not waited for."""

    size: int
    deadline: float
    num_arrived: int = 0


class Inbox:
    """Answers that the loop has not taken in yet: the *roster*.

    Args:
        moment: seconds that an idle engine waits after the first arrival.
        most: answers that may wait at a time, here or in the scheduler; ``None``: no bound.
    """

    def __init__(
        self, moment: Callable[[], float], most: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.roster = Roster()
        self._moment = moment
        self._most = most
        self._clock = clock
        self._first_came: float | None = None
        self._gangs: list[Gang] = []

    def __len__(self) -> int:
        return len(self.roster)

    def put(self, answers: Seq[Answer], num_requests: int, num_waiting: int = 0) -> None:
        """*answers* of *num_requests* requests arrive, beside *num_waiting* that wait elsewhere.

        Raises:
            QueueFull: more than may wait; none of them arrives.
        """
        num_waiting += len(self.roster)
        if self._most is not None and num_waiting + len(answers) > self._most:
            raise QueueFull(num_waiting, len(answers), self._most)
        for answer in answers:
            self.roster.add(answer)
        if self._first_came is None:
            self._first_came = self._clock()
        for gang in self._gangs:
            gang.num_arrived += num_requests

    def open_gang(self, size: int, seconds: float) -> Gang:
        """Hold arrivals until *size* requests are there, or *seconds* are over, or the gang is closed."""
        gang = Gang(size, self._clock() + seconds)
        self._gangs.append(gang)
        return gang

    def leave_gang(self, gang: Gang) -> None:
        """One member of *gang* is not going to come, or has come and gone."""
        gang.size -= 1

    def close_gang(self, gang: Gang) -> None:
        """Hold nobody for *gang* any more. Idempotent."""
        if gang in self._gangs:
            self._gangs.remove(gang)

    @property
    def has_gangs(self) -> bool:
        """Whether requests are waited for."""
        return bool(self._gangs)

    def take(self, *, is_idle: bool) -> tuple[list[Answer], float | None]:
        """What may join the next sweep, and in how many seconds to ask again (``None``: when something happens)."""
        if not len(self.roster) or self._first_came is None:
            self._first_came = None
            return [], None
        now = self._clock()
        waits = [gang.deadline - now for gang in self._gangs if gang.num_arrived < gang.size]
        if is_idle:
            waits.append(self._first_came + self._moment() - now)
        longest = max(waits, default=0.0)
        if longest > 0:
            return [], longest
        self._first_came = None
        return self.roster.drain(), None

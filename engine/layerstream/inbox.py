"""Where requests arrive and meet, so that they join the same sweep. Policy only: the engine's loop guards it.

Three things hold arrivals back, each for a bounded time: an engine that is idle waits for a moment after the first
arrival, a small part of a sweep, because who comes a millisecond later would wait for a whole sweep; an open gang
holds everybody until its members are there; and a sweep under way is never interrupted. Who runs already goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from layerstream.answer import Answer


@dataclass(eq=False, slots=True)
class Gang:
    """*size* requests that should share their sweeps; whoever is late after *deadline* is not waited for."""

    size: int
    deadline: float
    num_arrived: int = 0


class Inbox:
    """Answers that the loop has not taken in yet.

    Args:
        moment: seconds that an idle engine waits after the first arrival.
    """

    def __init__(self, moment: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._moment = moment
        self._clock = clock
        self._answers: list[Answer] = []
        self._first_came: float | None = None
        self._gangs: list[Gang] = []

    def __len__(self) -> int:
        return len(self._answers)

    def put(self, answers: Iterable[Answer], num_requests: int) -> None:
        """*answers* of *num_requests* requests arrive."""
        self._answers.extend(answers)
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

    def take(self, *, is_idle: bool) -> tuple[list[Answer], float | None]:
        """What may join the next sweep, and in how many seconds to ask again (``None``: when something happens)."""
        if not self._answers or self._first_came is None:
            return [], None
        now = self._clock()
        waits = [gang.deadline - now for gang in self._gangs if gang.num_arrived < gang.size]
        if is_idle:
            waits.append(self._first_came + self._moment() - now)
        longest = max(waits, default=0.0)
        if longest > 0:
            return [], longest
        taken, self._answers, self._first_came = self._answers, [], None
        return taken, None

    def remove(self, wanted: Callable[[Answer], bool]) -> list[Answer]:
        """Take out the answers that are *wanted*, whatever holds them."""
        found = [answer for answer in self._answers if wanted(answer)]
        self._answers = [answer for answer in self._answers if not wanted(answer)]
        return found

    def drain(self) -> list[Answer]:
        """Take out everything."""
        return self.remove(lambda answer: True)

"""Requests that run only while nobody asks. Policy only: the reception's lock guards it.

*Questions* are what callers submit; *idle work* (documents that are warmed) is taken while no question is on its way,
and leaves when one arrives. What leaves is cancelled under the same lock that lets the question in, so no sweep ever
has rows of both. A request is known here for as long as somebody holds it, and counts until it is done.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable

from layerstream.api.request import Request


class IdleWork:
    """Who asks, and what gives way.

    Args:
        rest: seconds after a question before idle work is taken again.
    """

    def __init__(self, rest: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._rest = rest
        self._clock = clock
        self._questions: weakref.WeakSet[Request] = weakref.WeakSet()
        self._idle: weakref.WeakSet[Request] = weakref.WeakSet()
        self._last_asked: float | None = None

    def ask(self, questions: Iterable[Request]) -> list[Request]:
        """*questions* arrive: the requests that have to leave for them."""
        self._questions.update(questions)
        self._last_asked = self._clock()
        leaving = [request for request in self._idle if not request.done()]
        self._idle.clear()
        return leaving

    def may_begin(self) -> bool:
        """Whether idle work may be taken: no question is on its way, or was a moment ago, and none is under way."""
        if self._drop_done(self._questions):
            self._last_asked = self._clock()
            return False
        if self._last_asked is not None and self._clock() - self._last_asked < self._rest():
            return False
        return not self._drop_done(self._idle)

    def begin(self, requests: Iterable[Request]) -> None:
        """*requests* are idle work, under way."""
        self._idle.update(requests)

    @staticmethod
    def _drop_done(requests: weakref.WeakSet[Request]) -> int:
        """How many of *requests* are left."""
        for request in [request for request in requests if request.done()]:
            requests.discard(request)
        return len(requests)

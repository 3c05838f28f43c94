"""Answers that are on their way, found by request and by deadline without a look at the others.

Not for several threads at a time: whoever has a roster guards it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from layerstream.api.request import Request
from layerstream.runtime.answer import Answer


class Roster:
    """Answers in order of arrival."""

    def __init__(self) -> None:
        self._answers: dict[Answer, None] = {}
        self._of_request: dict[Request, dict[Answer, None]] = {}
        self._deadlines: list[tuple[float, int, Answer]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Answer]:
        return iter(list(self._answers))

    def add(self, answer: Answer) -> None:
        """*answer* is the newest."""
        self._answers[answer] = None
        self._of_request.setdefault(answer.request, {})[answer] = None
        if answer.deadline < float("inf"):
            heapq.heappush(self._deadlines, (answer.deadline, next(self._numbers), answer))

    def remove(self, answer: Answer) -> None:
        """*answer* is on its way no more."""
        del self._answers[answer]
        of_request = self._of_request[answer.request]
        del of_request[answer]
        if not of_request:
            del self._of_request[answer.request]
        if len(self._deadlines) > 2 * len(self._answers) + 64:  # most of them are of answers that are gone
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._answers]
            heapq.heapify(self._deadlines)

    def of(self, request: Request) -> list[Answer]:
        """The answers of *request*."""
        return list(self._of_request.get(request, ()))

    def expired(self, now: float) -> list[Answer]:
        """Answers whose deadlines are over by *now*."""
        found = []
        while (first := self.next_deadline) is not None and first < now:
            found.append(heapq.heappop(self._deadlines)[2])
        return found

    @property
    def next_deadline(self) -> float | None:
        """When the next answer is to be given up."""
        while self._deadlines and self._deadlines[0][2] not in self._answers:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def drain(self) -> list[Answer]:
        """Take out everything."""
        answers = list(self._answers)
        self._answers.clear()
        self._of_request.clear()
        self._deadlines.clear()
        return answers

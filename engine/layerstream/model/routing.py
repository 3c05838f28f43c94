"""What the row blocks of a sweep ask the experts of one block, gathered before any of it is computed.

Where experts come as they are routed to, each of them is to pass once for all rows of a sweep, and a block sees one
row block at a time. So it runs twice: the first time it is left as soon as it asks for its experts, which says what the
rows want; then the experts compute all rows; the second time it gets what they gave. What it computes until it asks
(the router, with some families a shared expert) is computed twice; one row block alone is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from layerstream.core.sweep import Span
from layerstream.model.context import current


@dataclass(frozen=True, slots=True)
class Call:
    """What a block asked its experts: inputs ``(rows, hidden)``, and for each row its experts and their weights, both
    ``(rows, k)``; for padding -1. The rows are those of *spans*, each with the row that it starts at."""

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    spans: tuple[tuple[int, Span], ...]


Compute: TypeAlias = Callable[[Sequence[Call]], list[torch.Tensor]]
"""What the experts give, ``(rows, hidden)`` for each call."""


class _Asked(Exception):  # no error: it leaves a block that has said what it wants
    """A block asked its experts for the first time."""


class Routing:
    """The calls of one block in one sweep, and their answers, in the same order."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._compute: Compute | None = None
        self._answers: list[torch.Tensor] | None = None

    def ask(self, call: Call, compute: Compute) -> torch.Tensor:
        """The answer to *call*, which is as *compute* finds it.

        Raises:
            _Asked: it comes with the second run.
        """
        if self._answers is None:
            self._calls.append(call)
            self._compute = compute
            raise _Asked
        return self._answers.pop(0) if self._answers else compute([call])[0]

    def answer(self) -> None:
        """Compute what was asked."""
        self._answers = [] if self._compute is None else self._compute(self._calls)
        self._calls = []


@contextmanager
def gathering(forward: Callable[[slice], Any], row_blocks: Callable[[], Iterable[slice]]) -> Iterator[None]:
    """Find out by *forward* what all row blocks ask the experts; inside, they get it in the same order."""
    context = current()
    routing = context.routing = Routing()
    try:
        for rows in row_blocks():
            try:
                forward(rows)
            except _Asked:
                continue
        routing.answer()
        yield
    finally:
        context.routing = None

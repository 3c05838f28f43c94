"""Where experts are computed that an accelerator does not have: there, once they crossed, or by the processor. Pure.

The link and the processor work at the same time. Experts are divided between them so that the later of the two is done
as early as possible: with few rows an expert is computed in host memory sooner than it crosses (a few gigabytes per
second more than the link brings, and no copy), with many rows it crosses. What both take is measured as it happens: a
copy as a mean, computing as a straight line over an expert's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerstream.core.line import Line, mixed

ASSUMED_LINK_RATE = 20e9  # bytes per second, of PCIe 4 with 16 lanes
RETRY = 500  # layers without an expert for the processor, after which it gets one: one slow time must not settle it
RETRIED_ROWS = 4  # that it has at most
ASSUMED_HOST_RATE = 10e9  # bytes per second that a processor multiplies by, for a row or a few; soon measured


def divide(rows: Sequence[int], ship_seconds: float, host_seconds: Sequence[float]) -> list[int]:
    """Which of several experts the processor computes, by their places in *rows*; the others cross the link.

    Those with the fewest rows, as many of them as let both be done soonest; of as many rows, the first.

    Args:
        rows: of each expert.
        ship_seconds: what an expert takes to cross.
        host_seconds: what the processor takes for each.
    """
    order = sorted(range(len(rows)), key=lambda place: (rows[place], place))
    best, best_seconds, computing = 0, len(rows) * ship_seconds, 0.0
    for count, place in enumerate(order, 1):
        computing += host_seconds[place]
        seconds = max(computing, (len(rows) - count) * ship_seconds)
        if seconds < best_seconds:
            best, best_seconds = count, seconds
    return sorted(order[:best])


class ExpertPaths:
    """What both ways were measured to take.

    Args:
        expert_bytes: of a typical expert, for as long as nothing is measured.
    """

    def __init__(self, expert_bytes: int) -> None:
        self._expert_bytes = expert_bytes
        self._ship_seconds: float | None = None
        self._computing = Line()
        self._is_warm = False
        self._num_declined = 0

    def shipped(self, seconds: float) -> None:
        """An expert took so long to cross."""
        self._ship_seconds = mixed(self._ship_seconds, seconds)

    def computed(self, num_rows: int, seconds: float) -> None:
        """The processor took so long for an expert with *num_rows*; the first time it was not ready for it, and what it
        can do in half the time that was expected, it was disturbed at before."""
        if self._is_warm:
            if seconds < self._computing.at(num_rows) / 2:
                self._computing = Line()
            self._computing.add(num_rows, seconds)
        self._is_warm = True

    @property
    def ship_seconds(self) -> float:
        """What an expert takes to cross."""
        return self._expert_bytes / ASSUMED_LINK_RATE if self._ship_seconds is None else self._ship_seconds

    def host_seconds(self, num_rows: int) -> float:
        """What the processor takes for an expert with *num_rows*."""
        return self._computing.at(num_rows) or self._expert_bytes / ASSUMED_HOST_RATE * num_rows

    def choose(self, rows: Sequence[int], most_rows: int) -> list[int]:
        """Which of the experts with *rows* the processor computes, by their places; *most_rows* altogether, because
        they take host memory."""
        found = divide(rows, self.ship_seconds, [self.host_seconds(count) for count in rows])
        if not found and rows:
            self._num_declined += 1
            if self._num_declined >= RETRY and min(rows) <= RETRIED_ROWS:
                found = [rows.index(min(rows))]
        found.sort(key=lambda place: rows[place])
        while sum(rows[place] for place in found) > most_rows:
            found.pop()
        if found:
            self._num_declined = 0
        return sorted(found)

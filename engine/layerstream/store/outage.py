"""When something that failed is tried again: ever later while it goes on failing. Pure; the caller has the clock."""

from __future__ import annotations

FIRST_SECONDS = 0.25  # until it is tried again
LONGEST_SECONDS = 4.0
CALM_SECONDS = 60.0  # without a failure: the next one is another outage


class Outage:
    """Failures that belong together.

    Attributes:
        reason: of the last failure; empty: none yet.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._wait = FIRST_SECONDS
        self._failed_at: float | None = None

    def failed(self, now: float, reason: str) -> bool:
        """It failed, *now*; whether that begins another outage."""
        is_first = self._failed_at is None or now - self._failed_at > CALM_SECONDS
        self._wait = FIRST_SECONDS if is_first else min(2 * self._wait, LONGEST_SECONDS)
        self._failed_at, self.reason = now, reason
        return is_first

    def seconds_left(self, now: float) -> float:
        """Until it is to be tried again."""
        return 0.0 if self._failed_at is None else max(0.0, self._failed_at + self._wait - now)

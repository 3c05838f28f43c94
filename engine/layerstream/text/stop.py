"""Stop strings, matched across token boundaries and never shown."""

from __future__ import annotations


class StopMatcher:
    """Passes text on up to the first stop string, and holds back whatever could still become one.

    The stop string that *starts* first wins, as a search of the whole text would have it; of two that start at the same
    place, the shorter one, which is complete first. Where the text is cut into pieces makes no difference.

    Attributes:
        matched: the stop string that was found, or ``None``. Once it is set, nothing more is shown.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now that *text* has come."""
        if self.matched is not None:
            return ""
        self._held += text
        return self._release(self._unfinished())

    def finish(self) -> str:
        """The text is over: what was held back, up to a stop string that was waiting for an earlier one to end."""
        if self.matched is not None:
            return ""
        return self._release(len(self._held))

    def _release(self, end: int) -> str:
        """Let go of what is held up to *end*, or to the first stop string if none can begin before it."""
        found = [(at, len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        at, _, stop = min(found, default=(end + 1, 0, None))
        if at <= end:
            self.matched = stop
            shown, self._held = self._held[:at], ""
        else:
            shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _unfinished(self) -> int:
        """Where the first stop string begins that the end of the text may have cut; the text's end if there is none."""
        for at in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            rest = self._held[at:]
            if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stops):
                return at
        return len(self._held)

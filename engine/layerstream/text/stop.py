"""Stop strings, matched across token boundaries and never shown."""

from __future__ import annotations


class StopMatcher:
    """Passes text on up to the first stop string.

    Holds back whatever could still become one. The stop string that *starts* first wins; of two that start at the same
    place, the one that is complete first.

    Attributes:
        matched: the stop string that was found, or ``None``.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now that *text* has come."""
        if self.matched is not None:
            return ""
        self._held += text
        found = min(((at, len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        safe = self._num_safe()
        if found is not None and found[0] <= safe:
            self.matched = found[2]
            return self._held[: found[0]]
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """The text is over: what was held back is no stop string (or a later, complete one is found in it)."""
        if self.matched is not None:
            return ""
        found = min(((at, len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            self.matched = found[2]
            self._held = self._held[: found[0]]
        shown, self._held = self._held, ""
        return shown

    def _num_safe(self) -> int:
        """Characters at the start of what is held that no unfinished stop string can begin in."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for at in range(max(0, len(self._held) - longest + 1), len(self._held)):
            rest = self._held[at:]
            if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stops):
                return at
        return len(self._held)

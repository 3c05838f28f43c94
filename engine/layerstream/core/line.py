"""Measurements that are followed as they come: means and straight lines that forget what is long ago. Pure."""

from __future__ import annotations

NEW_SHARE = 0.3  # what the newest measurement counts


def mixed(old: float | None, new: float) -> float:
    """A mean that *new* moves; ``None``: there was none."""
    return new if old is None else old + NEW_SHARE * (new - old)


class Line:
    """A straight line through the latest points, with neither a negative slope nor a negative beginning.

    Args:
        memory: points after which one counts a third (1/e).
    """

    def __init__(self, memory: float = 10.0) -> None:
        self._fading = 1.0 - 1.0 / memory
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """One more point; those before it count a little less."""
        old = self._fading
        self._weight = old * self._weight + 1.0
        self._x = old * self._x + x
        self._y = old * self._y + y
        self._xx = old * self._xx + x * x
        self._xy = old * self._xy + x * y

    def at(self, x: float) -> float:
        """Its height there; 0.0 before the first point. Where all points are alike, it goes through the origin."""
        if not self._weight or not self._x:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        slope = mean_y / mean_x
        if variance > (mean_x / 20) ** 2:
            slope = min(slope, max(0.0, (self._xy / self._weight - mean_x * mean_y) / variance))
        return mean_y + slope * (x - mean_x)

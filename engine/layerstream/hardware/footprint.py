"""What an engine takes of the host's memory, measured: what the process has more than at the beginning."""

from __future__ import annotations

import re
import time
from pathlib import Path

import psutil

LEAST_SECONDS = 0.005  # between two looks: one takes 50 µs
_STATUS = Path("/proc/self/status")
_HELD = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)


class Footprint:
    """The most that was taken at any look since it was made. One thread looks.

    Attributes:
        peak_bytes: over what the process had when this was made; what other threads allocate meanwhile is in it too.
    """

    def __init__(self) -> None:
        self._before = held_bytes()
        self._next_look = 0.0
        self.peak_bytes = 0

    def look(self) -> None:
        """Compare with the most so far; nothing, if it was done a moment ago."""
        now = time.perf_counter()
        if now >= self._next_look:
            self._next_look = now + LEAST_SECONDS
            self.peak_bytes = max(self.peak_bytes, held_bytes() - self._before)


def held_bytes() -> int:
    """Memory of this process that no file is behind; all that is resident, where the system does not tell it apart."""
    try:
        fields = _HELD.findall(_STATUS.read_text())
    except OSError:
        fields = []
    return 1024 * sum(map(int, fields)) if fields else psutil.Process().memory_info().rss

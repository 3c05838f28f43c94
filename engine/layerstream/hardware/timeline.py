"""What went on when: reads, copies, waits and compute, span by span, for the trace of a sweep.

Nobody pays for it who has none: whoever takes part has a ``timeline`` that is ``None``. Spans of a device are known by
marks, and become times when they are asked for.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layerstream.hardware.device import Mark

MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """Something on *track*, in seconds since the timeline began."""

    track: str
    name: str
    start: float
    stop: float
    num_bytes: int = 0


class Timeline:
    """Collects spans from any thread."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._spans: list[TimeSpan] = []
        self._marked: list[tuple[str, str, Mark, Mark, int]] = []
        self._base: tuple[Mark, float] | None = None

    def add(self, track: str, name: str, started: float, stopped: float, num_bytes: int = 0) -> None:
        """What went on between two readings of ``time.perf_counter``."""
        with self._lock:
            self._spans.append(TimeSpan(track, name, started - self._began, stopped - self._began, num_bytes))

    def set_base(self, mark: Mark) -> None:
        """*mark*, timed, is about to be reached now: times of the device count from it."""
        if self._base is None:
            self._base = mark, time.perf_counter() - self._began

    def add_marks(self, track: str, name: str, start: Mark, stop: Mark, num_bytes: int = 0) -> None:
        """What a device did between two timed marks."""
        with self._lock:
            self._marked.append((track, name, start, stop, num_bytes))

    def spans(self) -> list[TimeSpan]:
        """All of it, in order of time; the device has reached all marks."""
        with self._lock:
            found, marked = list(self._spans), list(self._marked)
        if self._base is not None:
            base, offset = self._base
            for track, name, start, stop, num_bytes in marked:
                begin, end = (offset + mark.seconds_since(base) for mark in (start, stop))
                found.append(TimeSpan(track, name, begin, end, num_bytes))
        return sorted(found, key=lambda span: span.start)

    def write_chrome(self, path: str | Path) -> None:
        """As JSON that chrome://tracing and ui.perfetto.dev show."""
        Path(path).write_text(json.dumps({"traceEvents": list(self._events()), "displayTimeUnit": "ms"}))

    def _events(self) -> Iterator[dict[str, object]]:
        spans = self.spans()
        tracks = {track: number for number, track in enumerate(sorted({span.track for span in spans}), start=1)}
        for track, number in tracks.items():
            yield {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": track}}
        for span in spans:
            yield {
                "name": span.name,
                "ph": "X",
                "pid": 1,
                "tid": tracks[span.track],
                "ts": span.start * MICROSECONDS,
                "dur": (span.stop - span.start) * MICROSECONDS,
                "args": {"bytes": span.num_bytes},
            }

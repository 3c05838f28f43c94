"""One line that says what the engine is doing, once it takes longer than two seconds.

::

    sweep 3 · unit 12/28 · 2.1 GB/s · 5 tokens · next in 1.4 s

Events come in on the engine's threads; a listener made here takes them one at a time, never raises, starts no thread,
and leaves nothing behind on the terminal. On a terminal the line is drawn in the row below the cursor, so that text
which a program prints as it streams in stays whole.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TextIO
from weakref import WeakSet

from layerstream.api.arguments import refusal
from layerstream.api.events import (
    EngineIdle,
    Event,
    Listener,
    LoadProgress,
    PackProgress,
    SweepFinished,
    SweepStarted,
    UnitFinished,
)
from layerstream.core.sizes import format_size

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 2.0
REDRAW_SECONDS = 0.1
COLUMNS = 79  # one less than the narrowest terminal: some wrap after the last column


def make_listener(progress: Literal["auto"] | bool | Listener) -> Listener | None:
    """What is to be called with the engine's events.

    Args:
        progress: a function: itself, kept from raising into the engine; True: a :class:`ProgressLine`; ``"auto"``: one
            if stderr is a terminal or the program runs in a notebook; False: nothing.

    Raises:
        ConfigurationError: something else.
    """
    if callable(progress):
        return _Guarded(progress)
    if not isinstance(progress, bool | None) and not (isinstance(progress, str) and progress == "auto"):
        raise refusal("progress", progress, "'auto', True, False, or a function that is called with events")
    if progress is True or (progress == "auto" and (_is_terminal(sys.stderr) or _is_notebook())):
        return _Guarded(ProgressLine())
    return None


class ProgressLine:
    """Renders events as one line, drawn by tqdm on a terminal or in a notebook.

    Args:
        stream: where to draw; standard error if None.
        clock: seconds, only ever growing.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = threading.Lock()
        self._bar: Any = None
        self._busy_since: float | None = None
        self._drawn_at = float("-inf")
        self._sweep: SweepStarted | None = None
        self._sweep_since = 0.0
        self._num_sweeps = 0
        self._num_tokens = 0

    def __call__(self, event: Event) -> None:
        """Take *event* in, and draw if it is time to."""
        with self._lock:
            now = self._clock()
            match event:
                case LoadProgress():
                    self._load(event, now)
                case PackProgress():
                    self._pack(event, now)
                case SweepStarted():
                    self._begin_sweep(event, now)
                case UnitFinished() if self._sweep is not None:
                    self._show(_sweep_parts(event, self._sweep, now - self._sweep_since, self._done()), now)
                case SweepFinished():
                    self._num_tokens += event.tokens_out
                case EngineIdle():
                    self._rest()

    def close(self) -> None:
        """Take the line away. Idempotent; the next event may bring it back."""
        with self._lock:
            self._rest()

    def _load(self, event: LoadProgress, now: float) -> None:
        if event.done_bytes >= event.total_bytes:
            self._rest()
            return
        since = self._begin(now)
        self._show(_load_parts(event, now - since), now)

    def _pack(self, event: PackProgress, now: float) -> None:
        if event.done >= event.total:
            self._rest()
            return
        since = self._begin(now)
        parts = ["converting, once", f"{event.done} of {event.total} files"]
        if event.done:
            parts.append(f"{(now - since) / event.done * (event.total - event.done):.0f} s left")
        self._show(parts, now)

    def _begin_sweep(self, event: SweepStarted, now: float) -> None:
        self._begin(now)
        self._sweep, self._sweep_since = event, now
        self._num_sweeps += 1

    def _begin(self, now: float) -> float:
        """Since when something has been going on."""
        if self._busy_since is None:
            self._busy_since = now
            self._num_sweeps = self._num_tokens = 0
        return self._busy_since

    def _done(self) -> tuple[int, int]:
        return self._num_sweeps, self._num_tokens

    def _rest(self) -> None:
        self._busy_since = self._sweep = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, parts: list[str], now: float) -> None:
        since = now if self._busy_since is None else self._busy_since
        if now - since < PATIENCE_SECONDS or now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = now
        if self._bar is None:
            self._bar = _open_bar(self._stream or sys.stderr)
        self._bar.set_description_str(_join(parts))


class _Guarded:
    """Calls a listener; should it raise, says so once and never calls it again."""

    def __init__(self, listener: Listener) -> None:
        self._listener: Listener | None = listener

    def __call__(self, event: Event) -> None:
        if self._listener is None:
            return
        try:
            self._listener(event)
        except BaseException:  # whatever it was, even sys.exit(): an answer matters more than its progress
            logger.exception("the progress listener failed; it is switched off")
            self._listener = None


class _RowBelow(io.TextIOBase):
    """Passes what is written on to a terminal, one row below the cursor, and puts the cursor back."""

    _BELOW = "\x1bD\x1b[A"  # one row down, scrolling at the bottom, and up again: now there is a row below
    _CLEARED = "\x1b7\x1b[J"  # remember the place; erase the rest of the screen
    _DOWN, _BACK = "\x1b[B\r", "\x1b8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(self._BELOW + self._CLEARED + self._DOWN + text.strip("\r\n ") + self._BACK)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # tqdm asks whether it may draw more than ASCII
        return self._stream.encoding or "ascii"


def _open_bar(stream: TextIO) -> Any:
    from tqdm.auto import tqdm

    class Line(tqdm):
        monitor_interval = 0  # tqdm would start a thread
        _instances: ClassVar = WeakSet()  # a program's own bars neither move this line nor are moved by it

    has_escapes = _is_terminal(stream) and os.name == "posix" and not _is_notebook()
    file = _RowBelow(stream) if has_escapes else stream
    return Line(total=0, bar_format="{desc}", leave=False, file=file, ncols=COLUMNS, position=0)


def _sweep_parts(event: UnitFinished, sweep: SweepStarted, elapsed: float, so_far: tuple[int, int]) -> list[str]:
    num_sweeps, num_tokens = so_far
    done, total, elapsed = event.unit + 1, event.num_units, max(elapsed, 1e-6)
    parts = [f"sweep {num_sweeps}", f"unit {done}/{total}"]
    if sweep.streamed_bytes:
        parts.append(_rate(sweep.streamed_bytes * done / total / elapsed))  # residents are spread evenly over the units
    parts.append(f"{num_tokens} token{'s' * (num_tokens != 1)}")
    parts.append(f"next in {elapsed * max(0, total - done) / done:.1f} s")
    return parts


def _load_parts(event: LoadProgress, elapsed: float) -> list[str]:
    rate = event.done_bytes / max(elapsed, 1e-6)
    parts = ["loading", f"{format_size(event.done_bytes)} of {format_size(event.total_bytes)}", _rate(rate)]
    if rate:
        parts.append(f"{(event.total_bytes - event.done_bytes) / rate:.1f} s left")
    return parts


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.1f} GB/s"
    return f"{bytes_per_second / 1e6:.0f} MB/s"


def _join(parts: list[str]) -> str:
    """As many of *parts* as fit the line, from the left."""
    while len(line := " · ".join(parts)) > COLUMNS and len(parts) > 1:
        parts = parts[:-1]
    return line[:COLUMNS]


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _is_notebook() -> bool:
    """Whether this is an IPython kernel; asks only what is loaded already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and "IPKernelApp" in shell.config

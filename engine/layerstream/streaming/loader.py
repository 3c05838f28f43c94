"""Reads the units that stay: once, at the start, at the disk's speed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from layerstream.streaming.reader import DirectReader
from layerstream.streaming.ring import Arena
from layerstream.streaming.streamer import views
from layerstream.streaming.unit import UnitLayout


class Countdown:
    """Waits for a number of reads to be done, and raises the first error among them."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def __call__(self, error: Exception | None) -> None:
        """One read is done (the reader's callback)."""
        with self._changed:
            self._left -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when all reads are done."""
        with self._changed:
            while self._left:
                self._changed.wait()
        if self._error is not None:
            raise self._error


def load_unit(
    layout: UnitLayout, reader: DirectReader, on_read: Callable[[int], None] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one unit, in memory of their own; *on_read* is told the bytes of each finished request.

    Raises:
        ReadError, TruncatedFile: as the reader does.
    """
    return views(layout, load_image(layout, reader, on_read).tensor)


def load_image(layout: UnitLayout, reader: DirectReader, on_read: Callable[[int], None] | None = None) -> Arena:
    """The memory of one unit as it would be in a ring."""
    arena = Arena(layout.num_bytes)
    countdown = Countdown(len(layout.requests))
    for request in layout.requests:
        reader.submit(request, arena.view, 0, _told(countdown, on_read, request.needed_bytes))
    countdown.wait()
    return arena


def _told(countdown: Countdown, on_read: Callable[[int], None] | None, num_bytes: int) -> Callable[..., None]:
    def done(error: Exception | None) -> None:
        if on_read is not None and error is None:
            on_read(num_bytes)
        countdown(error)

    return done

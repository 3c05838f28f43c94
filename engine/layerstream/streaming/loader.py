"""Reads the units that stay: once, at the start, at the disk's speed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from layerstream.hardware.arena import Arena
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.layout import UnitLayout
from layerstream.streaming.streamer import views


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
    _, (image,) = load_images([layout], reader, on_read)
    return views(layout, image)


def load_images(
    layouts: Sequence[UnitLayout],
    reader: DirectReader,
    on_read: Callable[[int], None] | None = None,
    prepare: Callable[[Arena], None] = lambda arena: None,
) -> tuple[Arena, list[torch.Tensor]]:
    """Units one after the other in one piece of memory, each ``(num_bytes,)`` uint8 as it would be in a ring.

    Args:
        prepare: called with the memory before anything is read.
    """
    starts = list(accumulate((layout.num_bytes for layout in layouts), initial=0))
    arena = Arena(starts[-1])
    prepare(arena)
    read_all(layouts, arena, starts[:-1], reader, on_read)
    images = [arena.tensor[start : start + layout.num_bytes] for layout, start in zip(layouts, starts, strict=False)]
    return arena, images


def read_all(
    layouts: Sequence[UnitLayout],
    arena: Arena,
    starts: Sequence[int],
    reader: DirectReader,
    on_read: Callable[[int], None] | None = None,
) -> None:
    """Read units into *arena*, each from its byte of *starts* on; all are there on return.

    Raises:
        ReadError, TruncatedFile: as the reader does.
    """
    countdown = Countdown(sum(len(layout.requests) for layout in layouts))
    for layout, start in zip(layouts, starts, strict=True):
        for request in layout.requests:
            reader.submit(request, arena.view, start, _told(countdown, on_read, request.needed_bytes))
    countdown.wait()


def _told(countdown: Countdown, on_read: Callable[[int], None] | None, num_bytes: int) -> Callable[..., None]:
    def done(error: Exception | None) -> None:
        if on_read is not None and error is None:
            on_read(num_bytes)
        countdown(error)

    return done

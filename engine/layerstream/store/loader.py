"""Brings the stored pages of a sweep into memory, layer by layer, just ahead of the compute; and the states of
recurrent layers, which are pages of one token.

Reads for the first layers start with the sweep, those for layer i + 1 when layer i is reached; they go before the
weights in the reader's queue, so a layer's KV arrives beside its weights and the KV of all layers is never in flight
at once. Every page-layer is verified before anyone sees it: a wrong CRC ends the sweep with :class:`PagesLost`, the
store forgets the page, and the same sweep is scheduled again without it. A sweep that ends early has no effect (rows
past ``num_computed`` are written again), so nothing wrong is ever attended to, and nothing is read twice to be sure.

Invariants: ``begin`` … ``end`` or ``abort`` on one thread; runs are held open in between; after ``abort`` no read is
under way, so the frames may be used for something else.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from layerstream.core.sweep import PageLoad
from layerstream.errors import EngineClosed, LayerStreamError
from layerstream.hardware.reader import REQUEST_BYTES
from layerstream.kv.pages import LAYERS_AHEAD
from layerstream.kv.shape import PageShape
from layerstream.store.codecs import CODECS
from layerstream.store.segment import Key, padded
from layerstream.store.tiers.base import StoredRun


class PagesLost(LayerStreamError):
    """A stored page is damaged or gone; the loop computes it again and users never see this."""

    def __init__(self, key: Key, reason: str) -> None:
        super().__init__(reason)
        self.key = key


@dataclass(slots=True)
class LoadCounters:
    """What was loaded so far."""

    pages: int = 0
    num_bytes: int = 0
    wait_seconds: float = 0.0


class LayerPages(Protocol):
    """The pages of one layer, or the slots of a recurrent one."""

    def reserve(self, shape: PageShape) -> None:
        """Make room for tokens of *shape*; raises ``ValueError`` where there is room for those of another shape."""
        ...

    def fill(self, page: int, decode: Callable[[torch.Tensor, torch.Tensor], None], /) -> None:
        """Have *decode* write keys and values of *page*. Any thread."""
        ...


class PageLoader:
    """Loads pages into *layers*; where there are none, a page has no bytes, and nothing is looked for.

    Args:
        open_runs: runs that together are the keys given, or as many from the first on as are there.
    """

    def __init__(self, layers: Sequence[LayerPages], open_runs: Callable[[Sequence[Key]], list[StoredRun]]) -> None:
        self.counters = LoadCounters()
        self._layers = layers
        self._open_runs = open_runs
        self._changed = threading.Condition()
        self._runs: list[tuple[StoredRun, list[int]]] = []
        self._pending: dict[int, int] = {}
        self._error: Exception | None = None
        self._next_layer = 0

    def begin(self, loads: Sequence[PageLoad]) -> None:
        """Open what *loads* are stored in and start reading the first layers.

        Raises:
            PagesLost: one of them is not there any more.
        """
        self._error = None
        self._next_layer = 0
        self._pending = {}
        if not self._layers:
            return
        at = 0
        for run in self._open_runs([load.key for load in loads]) if loads else []:
            pages = [load.page for load in loads[at : at + len(run.slots)]]
            self._runs.append((run, pages))
            at += len(pages)
        if at < len(loads):
            self.abort()
            raise PagesLost(loads[at].key, "a stored prefix has gone")
        for run, pages in self._runs:
            if len(run.info.shapes) != len(self._layers):
                self.abort()
                raise PagesLost(run.info.keys[run.slots.start], "a stored prefix has another number of layers")
            self.counters.pages += len(pages)
        while self._runs and self._next_layer < min(LAYERS_AHEAD, len(self._layers)):
            self._start_layer()

    def wait(self, layer: int) -> None:
        """Return when the pages of *layer* are in memory.

        Raises:
            PagesLost: one of them is damaged, or cannot be read.
        """
        if not self._runs:
            return
        while self._next_layer <= min(layer + LAYERS_AHEAD, len(self._layers) - 1):
            self._start_layer()
        started = time.perf_counter()
        with self._changed:
            while self._pending[layer] and self._error is None:
                self._changed.wait()
            self.counters.wait_seconds += time.perf_counter() - started
            if self._error is not None:
                raise self._error

    def end(self) -> None:
        """The sweep is over."""
        self.abort()

    def abort(self) -> None:
        """Wait for what is being read, let go of all runs."""
        with self._changed:
            while any(self._pending.values()):
                self._changed.wait()
        for run, _ in self._runs:
            run.close()
        self._runs = []

    def _start_layer(self) -> None:
        layer = self._next_layer
        self._next_layer += 1
        self._pending[layer] = 0
        for run, pages in self._runs:
            try:
                self._layers[layer].reserve(run.info.shapes[layer])
            except ValueError as error:
                raise PagesLost(run.info.keys[run.slots.start], str(error)) from error
            size = padded(run.info.encoded_bytes[layer])
            step = max(1, REQUEST_BYTES // size)
            for first in range(0, len(pages), step):
                some = pages[first : first + step]
                slots = range(run.slots.start + first, run.slots.start + first + len(some))
                with self._changed:
                    self._pending[layer] += 1
                    self.counters.num_bytes += len(some) * size
                run.read(layer, slots, _Placer(self, run, layer, slots, some), self._done(layer, run, slots))

    def _done(self, layer: int, run: StoredRun, slots: range) -> Callable[[Exception | None], None]:
        def done(error: Exception | None) -> None:
            if error is not None and not isinstance(error, PagesLost | EngineClosed):
                error = PagesLost(run.info.keys[slots.start], str(error))
            with self._changed:
                self._pending[layer] -= 1
                self._error = self._error or error
                self._changed.notify_all()

        return done


class _Placer:
    """Verifies and decodes the page-layers of one read, on a reader thread."""

    __slots__ = ("_layer", "_loader", "_pages", "_run", "_slots")

    def __init__(self, loader: PageLoader, run: StoredRun, layer: int, slots: range, pages: list[int]) -> None:
        self._loader = loader
        self._run = run
        self._layer = layer
        self._slots = slots
        self._pages = pages

    def __call__(self, data: memoryview) -> None:
        info, layer = self._run.info, self._loader._layers[self._layer]
        size, codec = info.encoded_bytes[self._layer], CODECS[info.codec]
        for number, (slot, page) in enumerate(zip(self._slots, self._pages, strict=True)):
            start = number * padded(size)
            encoded = data[start : start + size]
            if zlib.crc32(encoded) != info.checksums[self._layer][slot]:
                raise PagesLost(info.keys[slot], f"page {slot} of {info.name} is damaged in layer {self._layer}")
            layer.fill(page, partial(codec.decode, encoded))

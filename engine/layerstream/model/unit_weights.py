"""Where the weights of a unit are while the model computes.

| class | has | a context gives |
|---|---|---|
| :class:`Resident` | the tensors of a module, which never leave | those |
| :class:`Staying` | the matrix that a Linear, or several, multiply by, which never leaves | weight and bias |
| :class:`Passing` | a place in the stream | the tensors as they are stored, valid within |

At the end of a context its :class:`Watch` is told that the unit was computed. Not after an error: then the sweep is
aborted as a whole, and what passes is not released one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from layerstream.hardware.device import Device, Mark
from layerstream.hardware.timeline import Timeline
from layerstream.model.matrices import Weights
from layerstream.streaming.layout import UnitLayout
from layerstream.streaming.streamer import Streamer

Tensors = Mapping[str, torch.Tensor]
OnBytes = Callable[[int], None]
Began: TypeAlias = Mark | float


class Watch:
    """Sees compute with units begin and end, on *device*; ``None``: the processor.

    Attributes:
        on_unit: told the weight bytes of each unit that was computed; may raise to abandon the sweep.
        timeline: told when that was; ``None``: nobody asks.
    """

    def __init__(self, device: Device | None) -> None:
        self.on_unit: OnBytes = lambda num_bytes: None
        self.timeline: Timeline | None = None
        self._device = device

    def begin(self) -> Began:
        """Compute with a unit begins; for :meth:`finish`."""
        if self.timeline is None or self._device is None:
            return time.perf_counter()
        mark = self._device.compute.mark(timed=True)
        self.timeline.set_base(mark)
        return mark

    def finish(self, layout: UnitLayout, began: Began) -> None:
        """The unit of *layout* was computed."""
        self.on_unit(layout.weight_bytes)
        if self.timeline is None:
            return
        if isinstance(began, float | int):
            self.timeline.add("compute", layout.name, began, time.perf_counter(), layout.weight_bytes)
        elif self._device is not None:
            stop = self._device.compute.mark(timed=True)
            self.timeline.add_marks("compute", layout.name, began, stop, layout.weight_bytes)


class Resident:
    """*tensors* in the dtypes that they are computed in; what is quantised as it is."""

    def __init__(self, watch: Watch, layout: UnitLayout, tensors: Tensors) -> None:
        self.tensors = tensors
        self._watch = watch
        self._layout = layout

    @contextmanager
    def stored(self) -> Iterator[Tensors]:
        """The tensors."""
        began = self._watch.begin()
        yield self.tensors
        self._watch.finish(self._layout, began)


class Passing:
    """The unit at *position* of what *streamer* brings."""

    def __init__(self, watch: Watch, streamer: Streamer, position: int) -> None:
        self._watch = watch
        self._streamer = streamer
        self._position = position

    @contextmanager
    def stored(self) -> Iterator[Tensors]:
        """Wait until it is there."""
        tensors = self._streamer.acquire(self._position)
        began = self._watch.begin()
        yield tensors
        self._streamer.release(self._position)
        self._watch.finish(self._streamer.layouts[self._position], began)


class Staying:
    """*weights*, made of the units of *layouts*. A context of itself: it is entered for every Linear of a sweep."""

    def __init__(self, watch: Watch, layouts: Sequence[UnitLayout], weights: Weights) -> None:
        self.weights = weights
        self._watch = watch
        self._layouts = layouts
        self._began: Began = 0.0

    def __call__(self) -> Staying:
        return self

    def __enter__(self) -> Weights:
        self._began = self._watch.begin()
        return self.weights

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for layout in self._layouts:
                self._watch.finish(layout, self._began)

"""Where new rows of keys and values arrive from devices: side by side, in pinned memory, layer after layer.

A row of a decoding sequence goes to a page of its own, so that copying rows to their pages would take two copies for
every sequence and layer. Here a row block takes two a layer; the host puts the rows into pages when the sweep is over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerstream.hardware.arena import Arena
from layerstream.hardware.device import Device
from layerstream.kv.shape import PageShape
from layerstream.kv.state import rows_in


class Staging:
    """Room for *num_rows* rows of layers with *shapes*, pinned for *device*. It grows where a sweep needs more.

    Attributes:
        num_rows: that there is room for.
    """

    def __init__(self, num_rows: int, shapes: Sequence[PageShape], device: Device) -> None:
        self._shapes = shapes
        self._device = device
        self.num_rows = 0
        self._arena: Arena | None = None
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.reserve(num_rows)

    def reserve(self, num_rows: int) -> None:
        """Have room for *num_rows*; nothing may be under way."""
        if num_rows <= self.num_rows:
            return
        self.close()
        self.num_rows = num_rows
        self._arena = Arena(num_rows * sum(shape.key_bytes + shape.value_bytes for shape in self._shapes))
        self._device.pin(self._arena)
        start = 0
        for shape in self._shapes:
            self._views.append(rows_in(self._arena.tensor[start:], num_rows, shape))
            start += num_rows * (shape.key_bytes + shape.value_bytes)

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``(num_rows, heads, width)`` and values of *layer*."""
        return self._views[layer]

    def close(self) -> None:
        """Unpin it. Idempotent."""
        arena, self._arena = self._arena, None
        self._views.clear()
        self.num_rows = 0
        if arena is not None:
            self._device.unpin(arena)

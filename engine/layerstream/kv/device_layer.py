"""Keys and values of one layer on a device: a *pool* of rows, as kernels read and write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from layerstream.kv.shape import PageShape
from layerstream.kv.state import LayerState, PagedRows, rows_in

ALIGNMENT = 256  # bytes
Place: TypeAlias = Callable[[int], torch.Tensor]
"""Memory on the device for so many bytes of the layer; other layers may take turns with it."""


class DeviceLayer(PagedRows):
    """Keys and values of one layer on the device; one row more than its pages have belongs to nobody.

    Attributes:
        host: the same in host memory.
        valid: pages that are the same there and here.
    """

    def __init__(self, place: Place, host: LayerState, num_pages: int, page_tokens: int) -> None:
        super().__init__(page_tokens, num_pages)
        self.host = host
        self.valid: set[int] = set()
        host.on_change = self.valid.discard
        self._place = place
        self._num_rows = num_pages * page_tokens + 1
        self._tensors: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(rows, heads, width)``."""
        assert self._tensors is not None, "nothing was written yet"
        return self._tensors

    def reserve(self, shape: PageShape) -> None:
        """Make room here and on the host."""
        if self._has_room:
            return
        self.host.reserve(shape)
        key_bytes, value_bytes = self._num_rows * shape.key_bytes, self._num_rows * shape.value_bytes
        start = -(-key_bytes // ALIGNMENT) * ALIGNMENT
        self._tensors = rows_in(self._place(start + value_bytes), self._num_rows, shape, ALIGNMENT)
        self._has_room = True

    def scatter(self, targets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write rows ``(n, heads, width)`` to the pool's rows *targets*."""
        for pool, rows in zip(self.pool, (keys, values), strict=True):
            pool.index_copy_(0, targets, rows)

    def row_range(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """*count* neighbouring rows."""
        keys, values = self.pool
        return keys[first : first + count], values[first : first + count]

    def _locate(self, first: int, count: int) -> tuple[slice, tuple[torch.Tensor, torch.Tensor]]:
        return slice(first * self._page_tokens, (first + count) * self._page_tokens), self.pool

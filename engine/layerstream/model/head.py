"""From final hidden states to logits: the head apart from its model, in row blocks of one size.

Only sampled rows go through, and a slice of the matrix passes once for all of them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from layerstream.hardware.arena import Arena
from layerstream.model.ends import ModelEnds
from layerstream.model.linear import SlicedLinear, padded_blocks


class Head:
    """Multiplies by *linear*, *block_rows* at a time, between what *ends* do."""

    def __init__(self, linear: SlicedLinear, ends: ModelEnds, block_rows: int) -> None:
        self._linear = linear
        self._ends = ends
        self._block_rows = block_rows
        self._room = _LogitRoom()

    def padded(self, num_rows: int) -> int:
        """Rows of as many row blocks as *num_rows* fill."""
        return -(-num_rows // self._block_rows) * self._block_rows

    def project(self, hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Logits ``(num_rows, vocabulary)`` of as many of the final hidden states ``(n, hidden)``; on a device what
        follows them up to whole row blocks is there, too, and logits of it are returned."""
        if not hidden.is_cpu:
            raw = self._linear.project(self._ends.lead(hidden), padded_blocks(len(hidden), self._block_rows))
            return self._ends.finish(hidden, raw)
        blocks = padded_blocks(num_rows, self._block_rows)
        padded = F.pad(self._ends.lead(hidden), (0, 0, 0, blocks[-1].stop - num_rows))
        raw = self._room.take(num_rows, self._linear.num_rows, hidden.dtype)
        return self._ends.finish(hidden, self._linear.project(padded, blocks, raw))


class _LogitRoom:
    """Memory that the logits of one sweep after the other lie in: in the heap, what the next sweep cannot use would
    stay beside them. It grows to the most rows that were wanted."""

    def __init__(self) -> None:
        self._arena: Arena | None = None

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """``(num_rows, width)``, holding anything; it is the room of the last call again."""
        num_bytes = num_rows * width * dtype.itemsize
        if self._arena is None or self._arena.num_bytes < num_bytes:
            self._arena = None  # before there is another
            self._arena = Arena(num_bytes)
        return self._arena.tensor[:num_bytes].view(dtype).view(num_rows, width)

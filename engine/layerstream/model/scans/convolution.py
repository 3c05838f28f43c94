"""Causal convolutions along a sequence, a filter per channel (``causal_conv1d_fn``).

The state is the last ``kernel - 1`` columns of the input ``(channels, kernel - 1)`` in its dtype: what a filter of
*kernel* taps reads of the past. (transformers' cache has one column more, which is never read.) Where a sequence
begins, the columns before it are zeros. Taps are added up in fp32, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import ACT2FN

from layerstream.kv.shape import StatePart
from layerstream.model import elementwise
from layerstream.model.scans.rows import copied, joined

BLOCK = 16  # rows at once: those of ten thousand channels are in a core's cache, and take half as long as 64 at once


@dataclass(frozen=True, slots=True)
class Convolution:
    """A call: columns ``(1, channels, rows)``, filters as ``(kernel, channels)`` in fp32, a copy; biases
    ``(channels,)``."""

    columns: torch.Tensor
    taps: torch.Tensor
    bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def part(self) -> StatePart:
        """The columns before."""
        kernel, channels = self.taps.shape
        return StatePart("conv", (channels, kernel - 1), str(self.columns.dtype).removeprefix("torch."))

    @property
    def num_rows(self) -> int:
        """Columns."""
        return self.columns.shape[2]

    def cut(self, rows: slice | torch.Tensor) -> Convolution:
        """Of *rows*."""
        return Convolution(self.columns[:, :, rows], self.taps, self.bias, self.activation)

    def kept(self) -> Convolution:
        """A copy."""
        return Convolution(self.columns.clone(), self.taps, copied(self.bias), self.activation)

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)``."""
        past = torch.zeros_like(left) if state is None else state
        read = torch.cat((past.mT, self.columns[0].mT))
        output = read.new_empty(self.num_rows, read.shape[1])
        for start in range(0, self.num_rows, BLOCK):
            found = output[start : start + BLOCK]
            found.copy_(self._filtered(read[start : start + len(found) + len(self.taps) - 1].float()))
        left.copy_(read[self.num_rows :].mT)
        return output.mT[None]

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, 1)``."""
        return self.chunk(state, left)

    def steps(self, states: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)``."""
        read = torch.cat((states.permute(2, 0, 1), self.columns.mT))
        values = read.float()
        found = values[0] * self.taps[0]
        for tap in range(1, len(self.taps)):
            found.addcmul_(values[tap], self.taps[tap])
        left.copy_(read[1:].permute(1, 2, 0))
        return self._finished(found).to(read.dtype).mT[None]

    def joined(self, outputs: list[torch.Tensor], rows: list[slice | torch.Tensor]) -> torch.Tensor:
        """``(1, channels, rows)``."""
        return joined([output.mT for output in outputs], rows, self.columns.mT).mT

    def _filtered(self, values: torch.Tensor) -> torch.Tensor:
        """``(rows, channels)`` in fp32, of these rows' *values* and those before that filters reach."""
        count = len(values) - len(self.taps) + 1
        found = values[:count] * self.taps[0]
        for tap in range(1, len(self.taps)):
            found.addcmul_(values[tap : tap + count], self.taps[tap])
        return self._finished(found)

    def _finished(self, found: torch.Tensor) -> torch.Tensor:
        """Sums of taps ``(rows, channels)`` with what comes after them."""
        if self.bias is not None:
            found += self.bias
        return found if self.activation is None else elementwise.apply(self.activation, found)


def convolution(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Convolution:
    """A call of ``causal_conv1d_fn``."""
    channels, kernel = weight.shape
    taps = torch.empty((kernel, channels), dtype=torch.float32, device=weight.device).copy_(weight.mT)
    return Convolution(hidden_states, taps, bias, None if activation is None else ACT2FN[activation])

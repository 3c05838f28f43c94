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
from layerstream.model.scans.rows import copied, in_pieces, joined


@dataclass(frozen=True, slots=True)
class Convolution:
    """A call: columns ``(1, channels, rows)``, filters ``(channels, kernel)``, biases ``(channels,)``."""

    columns: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def part(self) -> StatePart:
        """The columns before."""
        channels, kernel = self.weight.shape
        return StatePart("conv", (channels, kernel - 1), str(self.columns.dtype).removeprefix("torch."))

    @property
    def num_rows(self) -> int:
        """Columns."""
        return self.columns.shape[2]

    def cut(self, rows: slice) -> Convolution:
        """Of *rows*."""
        return Convolution(self.columns[:, :, rows], self.weight, self.bias, self.activation)

    def kept(self) -> Convolution:
        """A copy."""
        return Convolution(self.columns.clone(), self.weight.clone(), copied(self.bias), self.activation)

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)``."""
        return in_pieces(self, state, left, 2)

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, 1)``."""
        return in_pieces(self, state, left, 2)

    def piece(self, state: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)``."""
        read = torch.cat((state.mT, self.columns[0].mT))
        count = self.num_rows
        taps = self.weight.mT.to(torch.float32, memory_format=torch.contiguous_format)
        values = read.float()
        found = values[:count] * taps[0]
        for tap in range(1, len(taps)):
            found.addcmul_(values[tap : tap + count], taps[tap])
        if self.bias is not None:
            found += self.bias
        if self.activation is not None:
            found = self.activation(found)
        left.copy_(read[count:].mT)
        return found.to(self.columns.dtype).mT[None]

    def joined(self, outputs: list[torch.Tensor], rows: list[slice]) -> torch.Tensor:
        """``(1, channels, rows)``."""
        return joined([output.mT for output in outputs], rows, self.columns.mT).mT


def convolution(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Convolution:
    """A call of ``causal_conv1d_fn``."""
    return Convolution(hidden_states, weight, bias, None if activation is None else ACT2FN[activation])

"""Causal convolutions along a sequence, a filter per channel (``causal_conv1d_fn``).

The state is the last ``kernel - 1`` columns of the input ``(channels, kernel - 1)`` in its dtype: what a filter of
*kernel* taps reads of the past. (transformers' cache has one column more, which is never read.) Where a sequence
begins, the columns before it are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from layerstream.kv.shape import StatePart
from layerstream.model.scans.rows import copied, joined


@dataclass(frozen=True, slots=True)
class Convolution:
    """A call: columns ``(1, channels, rows)``, filters ``(channels, kernel)``, biases ``(channels,)``."""

    columns: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str | None

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
        return replace(self, columns=self.columns[:, :, rows])

    def kept(self) -> Convolution:
        """A copy."""
        return Convolution(self.columns.clone(), self.weight.clone(), copied(self.bias), self.activation)

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)``."""
        past = self.columns.new_zeros(1, *left.shape) if state is None else state[None]
        columns = torch.cat((past, self.columns), 2)
        left.copy_(columns[0, :, self.num_rows :])
        weight = self.weight
        found = F.conv1d(columns.to(weight.dtype), weight[:, None], self.bias, groups=len(weight))
        return self._activated(found).to(self.columns.dtype)

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, 1)``."""
        return self.chunk(state, left)

    def joined(self, outputs: list[torch.Tensor], rows: list[slice]) -> torch.Tensor:
        """``(1, channels, rows)``."""
        found = [output.transpose(1, 2) for output in outputs]
        return joined(found, rows, self.num_rows, self.columns.transpose(1, 2)).transpose(1, 2)

    def _activated(self, found: torch.Tensor) -> torch.Tensor:
        return found if self.activation is None else ACT2FN[self.activation](found)


def convolution(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Convolution:
    """A call of ``causal_conv1d_fn``."""
    return Convolution(hidden_states, weight, bias, activation)

"""Mamba's selective scan, a decay per channel and state (arXiv 2312.00752; ``mamba_selective_scan``).

A channel's state is a vector *h* ``(state width,)``. A row with input *x*, step *t* (after its bias and softplus), and
the *B* and *C* of all channels changes it and reads it, and gates what it read::

    h ← exp(t A) h + t x B
    y = (h·C + D x) silu(z)

transformers' function begins with nothing before; this one goes on from a state, so prompts may be cut. All of it is
computed in fp32, row after row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from layerstream.kv.shape import StatePart
from layerstream.model import elementwise
from layerstream.model.scans.decays import fading
from layerstream.model.scans.rows import copied, in_pieces, joined


@dataclass(frozen=True, slots=True)
class Weights:
    """*A* ``(channels, state width)``, *D* and the bias of steps ``(channels,)``, all copies, which calls cut from one
    share; whether steps are a softplus."""

    a: torch.Tensor
    d: torch.Tensor | None
    bias: torch.Tensor | None
    softplus: bool


@dataclass(frozen=True, slots=True)
class SelectiveScan:
    """A call: inputs, raw steps and gates ``(1, channels, rows)``, *B* and *C* ``(1, state width, rows)``."""

    inputs: torch.Tensor
    raw: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    gate: torch.Tensor | None
    weights: Weights
    with_state: bool

    @property
    def part(self) -> StatePart:
        """A vector per channel."""
        return StatePart("recurrent", (self.inputs.shape[1], self.b.shape[1]), "float32")

    @property
    def num_rows(self) -> int:
        """Of the batch's one sequence."""
        return self.inputs.shape[2]

    def cut(self, rows: slice | torch.Tensor) -> SelectiveScan:
        """Of *rows*."""
        return SelectiveScan(
            self.inputs[..., rows],
            self.raw[..., rows],
            self.b[..., rows],
            self.c[..., rows],
            None if self.gate is None else self.gate[..., rows],
            self.weights,
            self.with_state,
        )

    def kept(self) -> SelectiveScan:
        """A copy of what rows are given."""
        inputs, raw, b, c = self.inputs.clone(), self.raw.clone(), self.b.clone(), self.c.clone()
        return SelectiveScan(inputs, raw, b, c, copied(self.gate), self.weights, self.with_state)

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)`` in fp32."""
        return in_pieces(self, state, left, 2)

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, 1)`` in fp32."""
        return in_pieces(self, state, left, 2)

    def steps(self, states: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)`` in fp32."""
        inputs, b, c = (_by_row(tensor) for tensor in (self.inputs, self.b, self.c))
        steps = self._steps()
        written = steps * inputs
        torch.mul(states, fading(self.weights.a * steps[..., None]), out=left)
        left.addcmul_(written[..., None], b[:, None])
        return self._finished((left * c[:, None]).sum(-1), inputs)

    def piece(self, state: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)`` in fp32."""
        inputs, b, c = (_by_row(tensor) for tensor in (self.inputs, self.b, self.c))
        steps = self._steps()
        written = steps * inputs
        read = []
        left.copy_(state)
        for row in range(self.num_rows):
            left.mul_(fading(self.weights.a * steps[row, :, None])).addcmul_(written[row, :, None], b[row])
            read.append((left * c[row]).sum(1))
        return self._finished(torch.stack(read), inputs)

    def _steps(self) -> torch.Tensor:
        """``(rows, channels)`` in fp32."""
        raw, own = _by_row(self.raw), self.weights
        steps = raw if own.bias is None else raw + own.bias.float()
        return elementwise.apply(F.softplus, steps) if own.softplus else steps

    def _finished(self, read: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """``(1, channels, rows)``: what was *read* of states ``(rows, channels)``, with what comes after that."""
        if self.weights.d is not None:
            read = read + inputs * self.weights.d.float()
        if self.gate is not None:
            read = read * elementwise.apply(F.silu, _by_row(self.gate))
        return read.mT[None]

    def joined(self, outputs: list[torch.Tensor], rows: list[slice | torch.Tensor]) -> Any:
        """``(1, channels, rows)``, and no state if one was asked for."""
        found = joined([output.mT for output in outputs], rows, self.inputs.mT.float()).mT
        return (found, found.new_empty(0)) if self.with_state else found


def _by_row(tensor: torch.Tensor) -> torch.Tensor:
    """``(1, width, rows)`` as ``(rows, width)`` in fp32."""
    return tensor[0].mT.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803 -- transformers' names
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor | None = None,  # noqa: N803
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> SelectiveScan:
    """A call of ``mamba_selective_scan``."""
    weights = Weights(A.to(torch.float32, copy=True), copied(D), copied(delta_bias), delta_softplus)
    return SelectiveScan(hidden_states, dt, B, C, z, weights, return_last_state)

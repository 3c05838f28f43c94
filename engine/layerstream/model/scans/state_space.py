"""Mamba 2's state space, one decay per head (SSD, arXiv 2405.21060; ``mamba2_chunk_scan``).

A head's state is a matrix *S* ``(head width, state width)``. A row with input *x*, step *t* (positive, after its bias,
softplus and limits), and the *B* and *C* of the head's group changes it and reads it::

    S ← exp(t A) S + t x Bᵀ
    y = S C + D x

A chunk of rows at once, with ``c`` the ``t A`` added up from its beginning::

    yᵢ = exp(cᵢ) S Cᵢ + Σ_{j≤i} exp(cᵢ − cⱼ) (Cᵢ·Bⱼ) tⱼ xⱼ + D xᵢ
    S ← exp(cₙ) S + Σⱼ exp(cₙ − cⱼ) tⱼ xⱼ Bⱼᵀ

All of it is computed in fp32. Steps are limited in either form. (transformers' form for single rows forgets the
limits; they are (0, infinity) in all families but Zamba2.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from layerstream.kv.shape import StatePart
from layerstream.model.scans.rows import copied, joined, pieces

CHUNK = 64  # rows of a chunk


@dataclass(frozen=True, slots=True)
class Steps:
    """How steps ``(1, rows, heads)`` are made: their bias ``(heads,)``, softplus, limits."""

    bias: torch.Tensor | None
    softplus: bool
    limits: tuple[float, float]

    def made(self, raw: torch.Tensor) -> torch.Tensor:
        """``(heads, rows)`` in fp32, of *raw* ``(1, rows, heads)``."""
        steps = raw[0].mT.to(torch.float32, memory_format=torch.contiguous_format)
        if self.bias is not None:
            steps = steps + self.bias.float()[:, None]
        steps = F.softplus(steps) if self.softplus else steps
        return steps.clamp(*self.limits)


@dataclass(frozen=True, slots=True)
class StateSpace:
    """A call: inputs ``(1, rows, heads, head width)``, raw steps ``(1, rows, heads)``, *B* and *C* ``(1, rows, groups,
    state width)``, *A* and *D* ``(heads,)``."""

    inputs: torch.Tensor
    raw: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    a: torch.Tensor
    d: torch.Tensor | None
    steps: Steps
    with_state: bool

    @property
    def part(self) -> StatePart:
        """A matrix per head."""
        return StatePart("recurrent", (*self.inputs.shape[2:], self.b.shape[3]), "float32")

    @property
    def num_rows(self) -> int:
        """Of the batch's one sequence."""
        return self.inputs.shape[1]

    def cut(self, rows: slice) -> StateSpace:
        """Of *rows*."""
        return replace(self, inputs=self.inputs[:, rows], raw=self.raw[:, rows], b=self.b[:, rows], c=self.c[:, rows])

    def kept(self) -> StateSpace:
        """A copy."""
        return StateSpace(
            self.inputs.clone(),
            self.raw.clone(),
            self.b.clone(),
            self.c.clone(),
            self.a.clone(),
            copied(self.d),
            replace(self.steps, bias=copied(self.steps.bias)),
            self.with_state,
        )

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, head width)`` in fp32."""
        outputs = []
        for rows in pieces(self.num_rows, CHUNK):
            outputs.append(self.cut(rows)._piece(state, left))
            state = left
        return torch.cat(outputs, 1)

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, 1, heads, head width)`` in fp32."""
        return self._piece(state, left)

    def _piece(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        inputs, b, c = (_by_head(tensor) for tensor in (self.inputs, self.b, self.c))
        steps = self.steps.made(self.raw)
        reached = (steps * self.a.float()[:, None]).cumsum(1)
        between = (reached[:, :, None] - reached[:, None, :]).tril().exp_().tril()
        shared = len(inputs) // len(b)
        scores = (c @ b.mT).repeat_interleave(shared, 0) * between
        b, c = b.repeat_interleave(shared, 0), c.repeat_interleave(shared, 0)
        weighed = inputs * steps[..., None]
        output = scores @ weighed
        if state is not None:
            output = output + (c @ state.mT) * reached.exp()[..., None]
        if self.d is not None:
            output = output + inputs * self.d.float()[:, None, None]
        added = (weighed * (reached[:, -1:] - reached).exp()[..., None]).mT @ b
        if state is None:
            left.copy_(added)
        else:
            torch.mul(state, reached[:, -1].exp()[:, None, None], out=left).add_(added)
        return output.transpose(0, 1)[None]

    def joined(self, outputs: list[torch.Tensor], rows: list[slice]) -> Any:
        """``(1, rows, heads, head width)``, and no state if one was asked for."""
        found = joined(outputs, rows, self.num_rows, self.inputs.float())
        return (found, found.new_empty(0)) if self.with_state else found


def _by_head(tensor: torch.Tensor) -> torch.Tensor:
    """``(1, rows, heads, width)`` as ``(heads, rows, width)`` in fp32."""
    return tensor[0].transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def state_space(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803 -- transformers' names
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    chunk_size: int,
    D: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> StateSpace:
    """A call of ``mamba2_chunk_scan``."""
    steps = Steps(dt_bias, dt_softplus, (dt_limit[0], dt_limit[1]))
    return StateSpace(hidden_states, dt, B, C, A, D, steps, return_final_states)

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

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from layerstream.kv.shape import StatePart
from layerstream.model import elementwise
from layerstream.model.scans.decays import between, fading
from layerstream.model.scans.rows import by_head, by_row, copied, in_pieces, joined


@dataclass(frozen=True, slots=True)
class Heads:
    """What heads have of their own: *A*, *D* and the bias of steps ``(heads,)``; whether steps are a softplus, and
    between what."""

    a: torch.Tensor
    d: torch.Tensor | None
    bias: torch.Tensor | None
    softplus: bool
    limits: tuple[float, float]

    def kept(self) -> Heads:
        """A copy."""
        return Heads(self.a.clone(), copied(self.d), copied(self.bias), self.softplus, self.limits)

    def steps(self, raw: torch.Tensor) -> torch.Tensor:
        """``(rows, heads)`` in fp32, of *raw* ``(1, rows, heads)``."""
        steps = torch.empty(raw.shape[1:], dtype=torch.float32, device=raw.device).copy_(raw[0])
        if self.bias is not None:
            steps += self.bias
        return (elementwise.apply(F.softplus, steps) if self.softplus else steps).clamp_(*self.limits)


@dataclass(frozen=True, slots=True)
class StateSpace:
    """A call: inputs ``(1, rows, heads, head width)``, raw steps ``(1, rows, heads)``, *B* and *C* ``(1, rows, groups,
    state width)``; whether a state is asked for."""

    inputs: torch.Tensor
    raw: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    heads: Heads
    with_state: bool

    @property
    def part(self) -> StatePart:
        """A matrix per head."""
        return StatePart("recurrent", (*self.inputs.shape[2:], self.b.shape[3]), "float32")

    @property
    def num_rows(self) -> int:
        """Of the batch's one sequence."""
        return self.inputs.shape[1]

    def cut(self, rows: slice | torch.Tensor) -> StateSpace:
        """Of *rows*."""
        inputs, raw, b, c = self.inputs[:, rows], self.raw[:, rows], self.b[:, rows], self.c[:, rows]
        return StateSpace(inputs, raw, b, c, self.heads, self.with_state)

    def kept(self) -> StateSpace:
        """A copy."""
        inputs, raw, b, c = self.inputs.clone(), self.raw.clone(), self.b.clone(), self.c.clone()
        return StateSpace(inputs, raw, b, c, self.heads.kept(), self.with_state)

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, head width)`` in fp32."""
        return in_pieces(self, state, left, 1)

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, 1, heads, head width)`` in fp32."""
        return self.steps((torch.zeros_like(left) if state is None else state)[None], left[None])

    def steps(self, states: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, head width)`` in fp32."""
        inputs, b, c = self.inputs[0].float(), by_row(self.b), by_row(self.c)
        states, left = states.flatten(0, 1), left.flatten(0, 1)
        steps = self.heads.steps(self.raw)
        decay = (steps * self.heads.a).exp_()[..., None]
        weighed = inputs * steps[..., None]
        groups, total = len(b), len(left)
        read = torch.bmm(states, c.expand(-1, total // groups, -1).reshape(total, -1, 1)).view(inputs.shape)
        output = torch.addcmul(self._residual(inputs), read, decay)
        output.view(groups, -1).addcmul_(weighed.view(groups, -1), (b * c).sum(-1))
        torch.mul(states, decay.view(total, 1, 1), out=left)
        _by_group(left, groups).baddbmm_(weighed.view(groups, -1, 1), b)
        return output[None]

    def joined(self, outputs: list[torch.Tensor], rows: list[slice | torch.Tensor]) -> Any:
        """``(1, rows, heads, head width)``, and no state if one was asked for."""
        found = joined(outputs, rows, self.inputs.float())
        return (found, found.new_empty(0)) if self.with_state else found

    def piece(self, state: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, head width)`` in fp32."""
        _, rows, heads, width = self.inputs.shape
        inputs, b, c = self.inputs[0].float(), by_head(self.b), by_head(self.c)
        groups = len(b)
        steps = self.heads.steps(self.raw)
        reached = (steps * self.heads.a).cumsum(0)
        scores = (c @ b.mT)[:, None] * between(reached.mT.contiguous()).view(groups, -1, rows, rows)
        weighed = inputs * steps[..., None]
        within = scores.view(heads, rows, rows) @ weighed.transpose(0, 1)
        before = torch.bmm(c, _by_group(state, groups).mT).transpose(0, 1).reshape(rows, heads, width)
        output = torch.addcmul(self._residual(inputs), before, fading(reached.clone())[..., None])
        output += within.transpose(0, 1)
        end = reached[-1]
        faded = (weighed * fading(end - reached)[..., None]).view(rows, groups, -1).permute(1, 2, 0)
        torch.mul(state, fading(end.clone())[:, None, None], out=left)
        _by_group(left, groups).baddbmm_(faded, b)
        return output[None]

    def _residual(self, inputs: torch.Tensor) -> torch.Tensor:
        """What goes from *inputs* ``(..., heads, head width)`` straight to the output."""
        return torch.zeros_like(inputs) if self.heads.d is None else inputs * self.heads.d[:, None]


def _by_group(state: torch.Tensor, groups: int) -> torch.Tensor:
    """``(heads, head width, state width)`` as ``(groups, heads of one and their width, state width)``."""
    return state.view(groups, -1, state.shape[2])


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
    heads = Heads(A, D, dt_bias, dt_softplus, (dt_limit[0], dt_limit[1]))
    return StateSpace(hidden_states, dt, B, C, heads, return_final_states)

"""The gated delta rule, with one decay per head (Gated DeltaNet, arXiv 2412.06464) or one per key channel (Kimi Delta
Attention, arXiv 2510.26692).

A head's state is a matrix *S* ``(key width, value width)`` that tells values by keys. A row with query *q*, key *k*,
value *v*, decay *g* (a logarithm) and rate *b* changes it and reads it::

    S ← exp(g) S
    S ← S + kᵀ b (v − k S)
    o = q S

A chunk of rows at once: with ``c`` the decays added up from its beginning, the values that are written are the
solution *u* of a unit triangular system (the UT transform, arXiv 2406.06484), and then all rows read::

    uᵢ + Σ_{j<i} bᵢ (kᵢ exp(cᵢ − cⱼ) kⱼᵀ) uⱼ = bᵢ (vᵢ − kᵢ exp(cᵢ) S)
    oᵢ = qᵢ exp(cᵢ) S + Σ_{j≤i} (qᵢ exp(cᵢ − cⱼ) kⱼᵀ) uⱼ
    S ← exp(cₙ) S + Σⱼ (kⱼ exp(cₙ − cⱼ))ᵀ uⱼ

All of it is computed in fp32 (or by the kernels of :mod:`layerstream.model.scans.fused`). Query and key heads may be
fewer than value heads: each serves as many consecutive ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from layerstream.kv.shape import StatePart
from layerstream.model.scans import fused
from layerstream.model.scans.decays import between, faded_products, fading
from layerstream.model.scans.rows import by_head, by_row, in_pieces, joined

EPSILON = 1e-6  # of the norm of queries and keys


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """A call: queries and keys ``(1, rows, key heads, key width)``, values ``(1, rows, heads, value width)``, decays
    ``(1, rows, heads, 1 or key width)``, rates ``(1, rows, heads)``; whether queries and keys are to be normed."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    rate: torch.Tensor
    normed: bool

    @property
    def part(self) -> StatePart:
        """A matrix per head."""
        return StatePart("recurrent", (self.value.shape[2], self.key.shape[3], self.value.shape[3]), "float32")

    @property
    def num_rows(self) -> int:
        """Of the batch's one sequence."""
        return self.key.shape[1]

    def cut(self, rows: slice | torch.Tensor) -> DeltaRule:
        """Of *rows*."""
        query, key, value = self.query[:, rows], self.key[:, rows], self.value[:, rows]
        return DeltaRule(query, key, value, self.decay[:, rows], self.rate[:, rows], self.normed)

    def kept(self) -> DeltaRule:
        """A copy."""
        query, key, value = self.query.clone(), self.key.clone(), self.value.clone()
        return DeltaRule(query, key, value, self.decay.clone(), self.rate.clone(), self.normed)

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, value width)``."""
        if fused.takes(self.key):
            return self._fused(state, left, is_chunk=True)
        return in_pieces(self, state, left, 1)

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, 1, heads, value width)``."""
        if fused.takes(self.key):
            return self._fused(state, left, is_chunk=False)
        return self.steps((torch.zeros_like(left) if state is None else state)[None], left[None])

    def steps(self, states: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, value width)``."""
        if fused.takes(self.key):
            return self._fused_steps(states, left)
        query, key = self._normed(by_row(self.query), by_row(self.key))
        states, left = states.flatten(0, 1), left.flatten(0, 1)
        total, width = left.shape[0], left.shape[1]
        decay = by_row(self.decay).exp_().mT
        reading = torch.cat((key, query), 1)[:, None].expand(-1, total // len(key), -1, -1).reshape(total, 2, width)
        known, output = torch.bmm(reading * decay.mT, states).split(1, 1)
        written = (by_row(self.value) - known).mul_(by_row(self.rate[..., None]))
        torch.mul(states, decay, out=left).baddbmm_(reading[:, :1].mT, written)
        output = torch.addcmul(output, (reading[:, :1] * reading[:, 1:]).sum(-1, keepdim=True), written)
        return output.to(self.value.dtype).view(self.value.shape)

    def joined(
        self, outputs: list[torch.Tensor], rows: list[slice | torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(1, rows, heads, value width)``, and no state."""
        return joined(outputs, rows, self.value), self.value.new_empty(0)

    def piece(self, state: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, value width)``."""
        query, key = self._reading()
        rate = by_head(self.rate[..., None])
        reached = by_head(self.decay).cumsum(1)
        keys, queries = self._products(query, key, reached)
        faded = fading(reached.clone())
        written = by_head(self.value).mul_(rate).baddbmm_(_spread(key, faded * rate), state, alpha=-1)
        torch.linalg.solve_triangular(keys.mul_(rate), written, upper=False, unitriangular=True, out=written)
        output = torch.bmm(_spread(query, faded), state).baddbmm_(queries, written)
        end = reached[:, -1:]
        torch.mul(state, fading(end.clone()).mT, out=left).baddbmm_(_spread(key, fading(end - reached)).mT, written)
        return output.to(self.value.dtype).transpose(0, 1)[None]

    def _fused_steps(self, states: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, value width)``, by a kernel that takes every row for a sequence of a batch."""
        by_channel = self.decay.shape[3] > 1
        query, key, value, decay, rate = (
            tensor.transpose(0, 1) for tensor in (self.query, self.key, self.value, self.decay, self.rate)
        )
        output, after = fused.kernel(by_channel, is_chunk=False)(
            query,
            key,
            value,
            g=decay if by_channel else decay[..., 0],
            beta=rate,
            initial_state=states,
            output_final_state=True,
            use_qk_l2norm_in_kernel=self.normed,
        )
        left.copy_(after)
        return output.transpose(0, 1)

    def _fused(self, state: torch.Tensor | None, left: torch.Tensor, is_chunk: bool) -> torch.Tensor:
        """``(1, rows, heads, value width)``, by a kernel."""
        by_channel = self.decay.shape[3] > 1
        output, after = fused.kernel(by_channel, is_chunk)(
            self.query,
            self.key,
            self.value,
            g=self.decay if by_channel else self.decay[..., 0],
            beta=self.rate,
            initial_state=None if state is None else state[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=self.normed,
        )
        left.copy_(after[0])
        return output

    def _products(
        self, query: torch.Tensor, key: torch.Tensor, reached: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of keys, and of queries, with keys: ``(heads, rows, rows)`` each."""
        if self.decay.shape[3] > 1:
            keys, queries = faded_products(torch.stack((key, query)), key, reached)
            return keys, queries
        left = between(reached[..., 0])
        heads, rows, _ = left.shape
        shared = left.view(len(key), -1, rows, rows)
        keys, queries = ((reading @ key.mT)[:, None] * shared for reading in (key, query))
        return keys.view(heads, rows, rows), queries.view(heads, rows, rows)

    def _reading(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, scaled, and keys ``(key heads, rows, key width)``."""
        return self._normed(by_head(self.query), by_head(self.key))

    def _normed(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, scaled, and keys, of one form ``(..., key width)`` in fp32."""
        if self.normed:
            query, key = (x * (x * x).sum(-1, keepdim=True).add_(EPSILON).rsqrt_() for x in (query, key))
        return query * query.shape[-1] ** -0.5, key


def _spread(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``(key heads, rows, width)`` for each head, times *factors* ``(heads, rows, 1 or width)``."""
    heads, rows, _ = factors.shape
    shared = factors.view(len(tensor), -1, rows, factors.shape[2])
    return (tensor[:, None] * shared).view(heads, rows, tensor.shape[2])


def head_decay(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> DeltaRule:
    """A call of ``torch_chunk_gated_delta_rule`` or ``torch_recurrent_gated_delta_rule``."""
    return DeltaRule(query, key, value, g[..., None], beta, use_qk_l2norm_in_kernel)


def channel_decay(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> DeltaRule:
    """A call of ``chunk_kimi_delta_attention`` or ``recurrent_kimi_delta_attention``."""
    return DeltaRule(query, key, value, g, beta, use_qk_l2norm_in_kernel)

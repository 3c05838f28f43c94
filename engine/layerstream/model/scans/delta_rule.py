"""The gated delta rule with one decay per head (Gated DeltaNet, arXiv 2412.06464).

A head's state is a matrix *S* ``(key width, value width)`` that tells values by keys. A row with query *q*, key *k*,
value *v*, decay *g* (a logarithm) and rate *b* changes it and reads it::

    S ← exp(g) S
    S ← S + kᵀ b (v − k S)
    o = q S

A chunk of rows at once: with ``c`` the decays added up from its beginning, the values that are written are the
solution *u* of a unit triangular system (the UT transform, arXiv 2406.06484), and then all rows read::

    uᵢ + Σ_{j<i} bᵢ exp(cᵢ − cⱼ) (kᵢ·kⱼ) uⱼ = bᵢ (vᵢ − exp(cᵢ) kᵢ S)
    oᵢ = exp(cᵢ) qᵢ S + Σ_{j≤i} exp(cᵢ − cⱼ) (qᵢ·kⱼ) uⱼ
    S ← exp(cₙ) S + Σⱼ exp(cₙ − cⱼ) kⱼᵀ uⱼ

No exponent is above zero. All of it is computed in fp32. Query and key heads may be fewer than value heads: each
serves as many consecutive ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from layerstream.kv.shape import StatePart
from layerstream.model.scans.rows import joined, pieces

CHUNK = 64  # rows of a chunk: transformers' and flash-linear-attention's, too
EPSILON = 1e-6  # of the norm of queries and keys


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """A call: queries and keys ``(1, rows, key heads, key width)``, values ``(1, rows, heads, value width)``, decays
    and rates ``(1, rows, heads)``."""

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

    def cut(self, rows: slice) -> DeltaRule:
        """Of *rows*."""
        return DeltaRule(
            self.query[:, rows],
            self.key[:, rows],
            self.value[:, rows],
            self.decay[:, rows],
            self.rate[:, rows],
            self.normed,
        )

    def kept(self) -> DeltaRule:
        """A copy."""
        return DeltaRule(
            self.query.clone(),
            self.key.clone(),
            self.value.clone(),
            self.decay.clone(),
            self.rate.clone(),
            self.normed,
        )

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, value width)``."""
        outputs = []
        for rows in pieces(self.num_rows, CHUNK):
            outputs.append(self.cut(rows)._piece(state, left))
            state = left
        return torch.cat(outputs, 1).to(self.query.dtype)

    def _piece(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        query, key = self._reading()
        value, decay, rate = (_by_head(tensor) for tensor in (self.value, self.decay, self.rate))
        reached = decay.cumsum(1)
        between = (reached[:, :, None] - reached[:, None, :]).tril().exp_().tril()
        scores = torch.cat((key, query), 1) @ key.mT
        keys, queries = (scores * between.repeat(1, 2, 1)).chunk(2, 1)
        if state is None:
            wanted, output = value * rate[..., None], 0.0
        else:
            read = (torch.cat((key, query), 1) @ state) * reached.exp()[..., None].repeat(1, 2, 1)
            known, output = read.chunk(2, 1)
            wanted = (value - known) * rate[..., None]
        written = torch.linalg.solve_triangular(keys * rate[..., None], wanted, upper=False, unitriangular=True)
        output = output + queries @ written
        fading = (reached[:, -1:] - reached).exp()[..., None]
        added = (key * fading).mT @ written
        if state is None:
            left.copy_(added)
        else:
            torch.mul(state, reached[:, -1].exp()[:, None, None], out=left).add_(added)
        return output.transpose(0, 1)[None]

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, 1, heads, value width)``."""
        query, key = self._reading()
        value, decay, rate = self.value[0, 0].float(), self.decay[0, 0].float().exp(), self.rate[0, 0].float()
        if state is None:
            left.zero_()
            state = left
        torch.mul(state, decay[:, None, None], out=left)
        written = (value[:, None] - key @ left) * rate[:, None, None]
        left.baddbmm_(key.mT, written)
        return (query @ left).transpose(0, 1)[None].to(self.query.dtype)

    def joined(self, outputs: list[torch.Tensor], rows: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(1, rows, heads, value width)``, and no state."""
        return joined(outputs, rows, self.num_rows, self.value), self.value.new_empty(0)

    def _reading(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, scaled, and keys ``(heads, rows, key width)``."""
        query, key = _by_head(self.query), _by_head(self.key)
        if self.normed:
            query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON) for x in (query, key))
        shared = self.value.shape[2] // self.key.shape[2]
        query = query * query.shape[-1] ** -0.5
        return query.repeat_interleave(shared, 0), key.repeat_interleave(shared, 0)


def _by_head(tensor: torch.Tensor) -> torch.Tensor:
    """``(1, rows, heads, ...)`` as ``(heads, rows, ...)`` in fp32."""
    return tensor[0].transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> DeltaRule:
    """A call of ``torch_chunk_gated_delta_rule`` or ``torch_recurrent_gated_delta_rule``."""
    return DeltaRule(query, key, value, g, beta, use_qk_l2norm_in_kernel)

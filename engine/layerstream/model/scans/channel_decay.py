"""The delta rule with a decay per head and key channel (Kimi Delta Attention, arXiv 2510.26692).

As :mod:`layerstream.model.scans.delta_rule`, where ``exp(g)`` is a diagonal matrix: each row of a head's state decays
on its own. The products of two rows, ``Σ_d aᵢ_d exp(cᵢ_d − cⱼ_d) kⱼ_d``, are computed by blocks of :data:`BLOCK` rows:
for rows *i* of a block and rows *j* before it, the decay is cut in two where the block begins, so that no exponent is
above zero; within a block, pair by pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from layerstream.kv.shape import StatePart
from layerstream.model.scans.rows import joined, pieces

CHUNK = 64  # rows of a chunk: transformers' and flash-linear-attention's, too
BLOCK = 16  # rows between which decays are computed pair by pair
EPSILON = 1e-6  # of the norm of queries and keys


@dataclass(frozen=True, slots=True)
class ChannelDecay:
    """A call: queries, keys and decays ``(1, rows, heads, key width)``, values ``(1, rows, heads, value width)``, rates
    ``(1, rows, heads)``."""

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

    def cut(self, rows: slice) -> ChannelDecay:
        """Of *rows*."""
        return ChannelDecay(
            self.query[:, rows],
            self.key[:, rows],
            self.value[:, rows],
            self.decay[:, rows],
            self.rate[:, rows],
            self.normed,
        )

    def kept(self) -> ChannelDecay:
        """A copy."""
        return ChannelDecay(
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
        keys, queries = _products(torch.stack((key, query)), key, reached)
        if state is None:
            wanted, output = value * rate[..., None], 0.0
        else:
            faded = reached.exp()
            known, output = (torch.cat((key * faded, query * faded), 1) @ state).chunk(2, 1)
            wanted = (value - known) * rate[..., None]
        written = torch.linalg.solve_triangular(keys * rate[..., None], wanted, upper=False, unitriangular=True)
        output = output + queries @ written
        added = (key * (reached[:, -1:] - reached).exp()).mT @ written
        if state is None:
            left.copy_(added)
        else:
            torch.mul(state, reached[:, -1].exp()[..., None], out=left).add_(added)
        return output.transpose(0, 1)[None]

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """``(1, 1, heads, value width)``."""
        query, key = self._reading()
        value, decay, rate = self.value[0, 0].float(), self.decay[0, 0].float().exp(), self.rate[0, 0].float()
        if state is None:
            left.zero_()
            state = left
        torch.mul(state, decay[:, :, None], out=left)
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
            query, key = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + EPSILON) for x in (query, key))
        return query * query.shape[-1] ** -0.5, key


def _products(rows: torch.Tensor, key: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """Of each of *rows* ``(kinds, heads, n, width)`` with the keys up to it, decayed: ``(kinds, heads, n, n)``."""
    found = rows.new_zeros((*rows.shape[:-1], rows.shape[-2]))
    for at in pieces(rows.shape[-2], BLOCK):
        here, start = reached[:, at], reached[:, at.start, None]
        if at.start:
            before = slice(0, at.start)
            earlier = key[:, before] * (start - reached[:, before]).exp()
            found[..., at, before] = (rows[:, :, at] * (here - start).exp()) @ earlier.mT
        between = here[:, :, None] - here[:, None]
        later = torch.ones(between.shape[1:3], dtype=torch.bool, device=rows.device).triu(1)
        between = between.masked_fill(later[..., None], float("-inf")).exp_() * key[:, None, at]
        found[..., at, at] = (between @ rows[:, :, at, :, None])[..., 0]
    return found


def _by_head(tensor: torch.Tensor) -> torch.Tensor:
    """``(1, rows, heads, ...)`` as ``(heads, rows, ...)`` in fp32."""
    return tensor[0].transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def channel_decay(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> ChannelDecay:
    """A call of ``chunk_kimi_delta_attention`` or ``recurrent_kimi_delta_attention``."""
    return ChannelDecay(query, key, value, g, beta, use_qk_l2norm_in_kernel)

"""Kernels that only a card has, as plain formulas: each is one operator, so that it counts as one launch."""

from __future__ import annotations

import torch
from layerstream.model.ragged_kernels import Ragged, formula, hidden

FUNCTIONS = torch.library.Library("pretended", "DEF")
FUNCTIONS.define(
    "attend(Tensor queries, Tensor keys, Tensor values, Tensor ends, Tensor begins, Tensor lengths, float scale, "
    "bool has_mask, int window) -> (Tensor, Tensor)"
)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    begins: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    has_mask: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query by the formula, and the logarithms of its sums."""
    out = queries.new_zeros((len(queries), queries.shape[1], values.shape[2]))
    sums = torch.zeros(queries.shape[:2])
    for first, last, begin, length in zip(
        ends[:-1].tolist(), ends[1:].tolist(), begins.tolist(), lengths.tolist(), strict=False
    ):
        seen = slice(begin, begin + length)
        some = queries[first:last]
        out[first:last] = formula(some, keys[seen], values[seen], scale, window if window > 0 else None, has_mask)
        group = queries.shape[1] // keys.shape[1]
        scores = torch.einsum("rhw,nhw->rhn", some.float(), keys[seen].float().repeat_interleave(group, 1)) * scale
        if has_mask:
            scores.masked_fill_(hidden(len(some), length, window if window > 0 else None)[:, None], float("-inf"))
        sums[first:last] = torch.logsumexp(scores, dim=-1)
    return out, sums


FUNCTIONS.impl("attend", _attend, "CPU")


def flash(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ragged: Ragged, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of :func:`layerstream.model.ragged_kernels.flash`."""
    numbers = ragged.query_ends, ragged.key_begins, ragged.lengths
    found, sums = torch.ops.pretended.attend(
        queries, keys, values, *numbers, scale, ragged.has_mask, ragged.window or 0
    )
    return found, sums


def efficient(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ragged: Ragged, scale: float
) -> tuple[torch.Tensor, None]:
    """In place of :func:`layerstream.model.ragged_kernels.efficient`."""
    return flash(queries, keys, values, ragged, scale)[0], None

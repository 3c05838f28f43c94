"""Rows of a call: piece by piece, head by head, and one tensor of what was computed span by span. Pure."""

from __future__ import annotations

from typing import Protocol

import torch

PIECE = 64  # rows; transformers' and flash-linear-attention's chunk of a delta rule, too


class Pieces(Protocol):
    """A call that may be computed piece by piece."""

    @property
    def num_rows(self) -> int:
        """Rows that it has."""
        ...

    def cut(self, rows: slice | torch.Tensor) -> Pieces:
        """Of *rows* alone."""
        ...

    def piece(self, state: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """The output for its rows, of which there are :data:`PIECE` at most; *left* is the state after them."""
        ...


def in_pieces(call: Pieces, state: torch.Tensor | None, left: torch.Tensor, dim: int) -> torch.Tensor:
    """The output of *call* for a span that goes on from *state*, its rows at *dim*.

    Every piece is computed in a shape of its own. So the bits are the same whether a span comes whole or cut after
    whole pieces.
    """
    state = torch.zeros_like(left) if state is None else state
    outputs: list[torch.Tensor] = []
    for start in range(0, call.num_rows, PIECE):
        outputs.append(call.cut(slice(start, start + PIECE)).piece(state, left))
        state = left
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)


def by_head(tensor: torch.Tensor) -> torch.Tensor:
    """``(1, rows, heads, width)`` as ``(heads, rows, width)`` in fp32; always a copy, for which kernel computes, and so
    the bits, may depend on how a tensor lies in memory."""
    _, rows, heads, width = tensor.shape
    return torch.empty((heads, rows, width), dtype=torch.float32, device=tensor.device).copy_(tensor[0].transpose(0, 1))


def by_row(tensor: torch.Tensor) -> torch.Tensor:
    """``(1, rows, heads, width)`` as ``(rows * heads, 1, width)`` in fp32, a copy."""
    _, rows, heads, width = tensor.shape
    return torch.empty((rows * heads, 1, width), dtype=torch.float32, device=tensor.device).copy_(
        tensor.reshape(-1, 1, width)
    )


def joined(outputs: list[torch.Tensor], rows: list[slice | torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """*outputs* ``(1, rows, ...)``, as far as they have places, at *rows* of as many as *like* ``(1, all rows, ...)``
    has; zeros elsewhere."""
    if len(outputs) == 1 and outputs[0].shape[1] == like.shape[1] and isinstance(rows[0], slice):
        return outputs[0]  # what is past the rows with places is padding in either
    whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for output, at in zip(outputs, rows, strict=True):
        count = at.stop - at.start if isinstance(at, slice) else len(at)
        whole[:, at] = output[:, :count]
    return whole


def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy, if there is anything."""
    return None if tensor is None else tensor.clone()

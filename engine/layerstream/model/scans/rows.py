"""Rows of a call: piece by piece, head by head, and one tensor of what was computed span by span. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def pieces(num_rows: int, size: int) -> Iterator[slice]:
    """*num_rows* rows, *size* at a time; the last piece has what is left."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def by_head(tensor: torch.Tensor) -> torch.Tensor:
    """``(1, rows, heads, width)`` as ``(heads, rows, width)`` in fp32; always a copy, for which kernel computes, and so
    the bits, may depend on how a tensor lies in memory."""
    _, rows, heads, width = tensor.shape
    return torch.empty((heads, rows, width), dtype=torch.float32, device=tensor.device).copy_(tensor[0].transpose(0, 1))


def joined(outputs: list[torch.Tensor], rows: list[slice], like: torch.Tensor) -> torch.Tensor:
    """*outputs* ``(1, rows, ...)`` at *rows* of as many as *like* ``(1, all rows, ...)`` has; zeros elsewhere."""
    if len(outputs) == 1 and outputs[0].shape[1] == like.shape[1]:
        return outputs[0]
    whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for output, at in zip(outputs, rows, strict=True):
        whole[:, at] = output
    return whole


def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy, if there is anything."""
    return None if tensor is None else tensor.clone()

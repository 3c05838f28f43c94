"""Rows of a call: what its tensors have of them, and one tensor of what was computed span by span. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def pieces(num_rows: int, size: int) -> Iterator[slice]:
    """*num_rows* rows, *size* at a time; the last piece has what is left."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def joined(outputs: list[torch.Tensor], rows: list[slice], num_rows: int, like: torch.Tensor) -> torch.Tensor:
    """*outputs* ``(1, rows, ...)`` at *rows* of *num_rows*; zeros elsewhere, shaped *like* what there might be."""
    if len(outputs) == 1 and outputs[0].shape[1] == num_rows:
        return outputs[0]
    whole = (
        like.new_zeros((1, num_rows, *like.shape[2:]))
        if not outputs
        else outputs[0].new_zeros((1, num_rows, *outputs[0].shape[2:]))
    )
    for output, at in zip(outputs, rows, strict=True):
        whole[:, at] = output
    return whole


def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy, if there is anything."""
    return None if tensor is None else tensor.clone()

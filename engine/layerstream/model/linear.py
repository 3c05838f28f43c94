"""A Linear whose rows stream past in slices: the output projection, and any Linear larger than the ring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional as F

from layerstream.model.context import current

SliceWeights: TypeAlias = Callable[[], AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]]
"""Makes weight ``(rows of the slice, in)`` and bias of a slice present for the time of the context."""


@dataclass(frozen=True, slots=True)
class LinearSlice:
    """Output rows ``[first, last)`` of a Linear."""

    first: int
    last: int
    weights: SliceWeights


class SlicedLinear:
    """``x @ weight.T + bias`` with the weight in slices; every slice passes once, for all row blocks."""

    def __init__(self, slices: Sequence[LinearSlice]) -> None:
        self.slices = slices
        self.num_rows = slices[-1].last

    def project(self, inputs: torch.Tensor, row_blocks: Iterable[slice]) -> torch.Tensor:
        """``(n, in)`` to ``(n, out)``, computed one of *row_blocks* at a time."""
        blocks = list(row_blocks)
        output = inputs.new_empty((inputs.shape[0], self.num_rows))
        for part in self.slices:
            with part.weights() as (weight, bias):
                for rows in blocks:
                    output[rows, part.first : part.last] = F.linear(inputs[rows], weight, bias)
        return output

    def install(self, module: torch.nn.Module) -> None:
        """Make *module* compute this way, by the sweep's row blocks."""

        def run(inputs: torch.Tensor) -> torch.Tensor:
            flat = inputs.reshape(-1, inputs.shape[-1])
            context = current()
            whole = flat.shape[0] != context.num_rows  # not rows of the sweep: expanded latents
            blocks = [slice(0, flat.shape[0])] if whole else list(context.row_blocks())
            return self.project(flat, blocks).view(*inputs.shape[:-1], -1)

        module.forward = run


def padded_blocks(num_rows: int, block_rows: int) -> list[slice]:
    """Row blocks of *block_rows* that cover *num_rows*, the last one reaching past the end."""
    return [slice(at, at + block_rows) for at in range(0, num_rows, block_rows)]

"""What a wrapped module sees of a sweep."""

from __future__ import annotations

import torch
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.model import hooks
from layerstream.model.context import SweepContext, sweeping


def test_row_blocks_come_one_by_one_with_ordinary_strides() -> None:
    """A product with rows cut out of ``(1, rows, width)`` takes torch five times as long."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    class Doubling(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(inputs.shape), inputs.stride()))
            return inputs * scale

    module = Doubling()
    hooks.wrap(module)
    sequence = Sequence(0, list(range(5)), 5, SamplingParams())
    blocks = (RowBlock((Span(sequence, 0, 3),), 3), RowBlock((Span(sequence, 3, 5),), 2))
    inputs, scale = torch.randn(1, 5, 4), torch.full((5, 1), 2.0)
    with sweeping(SweepContext(Sweep(blocks, ()), [], [])):
        found = module(inputs, scale)
    assert torch.equal(found, inputs * 2)
    assert seen == [((1, 3, 4), (12, 4, 1)), ((1, 2, 4), (8, 4, 1))]

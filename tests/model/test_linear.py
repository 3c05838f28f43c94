"""Linears that are more than one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from layerstream.api.params import SamplingParams
from layerstream.checkpoint.codecs.bnb import BnbInt8
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.model import linear
from layerstream.model.context import Rows, SweepContext, sweeping
from layerstream.model.linear import JoinedLinears, LinearSlice, PackedMatrix, PlainMatrix, SlicedLinear, padded_blocks


def whole(matrix: linear.Matrix, rows: int, bias: torch.Tensor | None = None) -> SlicedLinear:
    @contextmanager
    def weights() -> Iterator[tuple[linear.Matrix, torch.Tensor | None]]:
        yield matrix, bias

    return SlicedLinear([LinearSlice(0, rows, weights)])


def test_padded_blocks_know_what_is_padding() -> None:
    assert padded_blocks(10, 4) == [Rows(0, 4, 4), Rows(4, 8, 8), Rows(8, 12, 10)]


@pytest.mark.parametrize("fused_rows", [0, 4, 8])
def test_narrow_blocks_go_through_the_kernel_and_wide_ones_are_decoded(fused_rows: int) -> None:
    values = torch.randint(-127, 128, (96, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales, calls = torch.rand(96) + 0.5, []

    class Recording(BnbInt8):
        def product(self, planes: object, inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
            calls.append(len(inputs))
            return super().product(planes, inputs)  # type: ignore[arg-type]

    scratch = torch.empty(40 * 64, dtype=torch.bfloat16)
    planes = {"weight": values, "SCB": scales}
    matrix = PackedMatrix(Recording(), planes, 0, 96, 64, scratch, fused_rows)
    bias = torch.randn(96).to(torch.bfloat16)
    inputs = torch.randn(12, 64).to(torch.bfloat16)
    blocks = [Rows(0, 4, 3), Rows(4, 12, 12)]
    found = whole(matrix, 96, bias).project(inputs, blocks)
    weight = values.float() * (scales[:, None] / 127)
    expected = inputs.float() @ weight.T + bias.float()
    used = [0, 1, 2, *range(4, 12)]
    assert (found[used].float() - expected[used]).abs().max() <= 0.02 * expected.abs().max()
    assert calls == {0: [], 4: [3], 8: [3, 8]}[fused_rows], "padding is left out"


def test_joined_linears_take_one_input_at_a_time() -> None:
    weight = torch.randn(24, 8)
    modules = [torch.nn.Linear(8, rows, bias=False) for rows in (16, 8)]
    JoinedLinears(whole(PlainMatrix(weight), 24), [16, 8]).install(modules)
    sequence = Sequence(0, [1, 2, 3], 3, SamplingParams())
    sweep = Sweep((RowBlock((Span(sequence, 0, 3),), 3),), ())
    first, second = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    with sweeping(SweepContext(sweep, [], [])):
        assert torch.allclose(modules[0](first), first @ weight[:16].T, atol=1e-5)
        assert torch.allclose(modules[1](first), first @ weight[16:].T, atol=1e-5)
        modules[0](first)
        assert torch.allclose(modules[1](second), second @ weight[16:].T, atol=1e-5), "another input"
        assert torch.allclose(modules[1](second), second @ weight[16:].T, atol=1e-5), "the last one, alone"
        assert torch.allclose(modules[0](second), second @ weight[:16].T, atol=1e-5)


def test_expanded_latents_are_all_computed_even_if_they_are_as_many_as_the_rows_in_hand() -> None:
    class Doubling(BnbInt8):
        def product(self, planes: object, inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
            return 2 * inputs

    matrix = PackedMatrix(Doubling(), {}, 0, 8, 8, torch.empty(0), fused_rows=16)
    module = torch.nn.Linear(8, 8, bias=False)
    whole(matrix, 8).install(module)
    sequence = Sequence(0, [1, 2, 3, 4], 1, SamplingParams())
    sweep = Sweep((RowBlock((Span(sequence, 3, 4),), 4),), ())
    latents = torch.randn(1, 1, 4, 8)
    with sweeping(SweepContext(sweep, [], [])):
        assert torch.equal(module(latents), 2 * latents)

"""A Linear whose rows stream past in slices: the output projection, and any Linear larger than the ring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch.nn import functional as F

from layerstream.checkpoint.names import PackedSource
from layerstream.model.context import current

TILE_VALUES = 2**20  # decoded at a time: they stay in the processor's cache until they have been multiplied by


class Matrix(Protocol):
    """The weight ``(rows, in)`` of a slice, present."""

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Its rows ``[start, stop)`` in the compute dtype, part by part; each is valid until the next."""
        ...


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """A weight that is stored as numbers."""

    weight: torch.Tensor

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The whole."""
        yield 0, self.weight.shape[0], self.weight


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Rows ``[first, last)`` of a quantised weight, decoded tile by tile into *scratch*."""

    source: PackedSource
    planes: Mapping[str, torch.Tensor]
    first: int
    last: int
    scratch: torch.Tensor

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """As many rows at a time as :data:`TILE_VALUES` allows."""
        columns, num_rows = self.source.shape[-1], self.last - self.first
        step = tile_rows(self.source)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            tile = self.scratch[: (stop - start) * columns].view(stop - start, columns)
            planes = self.source.codec.cut(self.planes, num_rows, start, stop)
            self.source.codec.decode(planes, self.first + start, tile)
            yield start, stop, tile


def tile_rows(source: PackedSource) -> int:
    """Rows of *source* that are decoded at a time."""
    rows, columns = source.shape
    step = source.codec.row_step
    return min(rows, max(step, TILE_VALUES // columns // step * step)) if step else rows


def decode_bytes(source: PackedSource, dtype: torch.dtype) -> int:
    """What decoding takes: a tile in *dtype*, and what a codec computes it from: codes as integers, values in fp32."""
    return tile_rows(source) * source.shape[1] * (dtype.itemsize + 12)


SliceWeights: TypeAlias = Callable[[], AbstractContextManager[tuple[Matrix, torch.Tensor | None]]]
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
            with part.weights() as (matrix, bias):
                for start, stop, weight in matrix.tiles():
                    columns = slice(part.first + start, part.first + stop)
                    tile_bias = None if bias is None else bias[start:stop]
                    for rows in blocks:
                        output[rows, columns] = F.linear(inputs[rows], weight, tile_bias)
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

"""Linears that are more than one call: their rows stream past in slices, or their weights are quantised.

A row block multiplies by quantised weights in one of two ways, by its number of rows alone: at most so many as the
plan says go through a kernel that takes the weights as they are; more are worth decoding the weights for, tile by
tile. On the processor the kernels leave padding out: they give a row the same bits whatever the others are. On an
accelerator, where they do so for as many rows, they get whole row blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch.nn import functional as F

from layerstream.checkpoint.codecs.base import Codec
from layerstream.checkpoint.names import PackedSource
from layerstream.model.context import Rows, current

TILE_VALUES = 2**20  # decoded at a time: they stay in the processor's cache until they have been multiplied by
DEVICE_TILE_VALUES = 2**25  # on an accelerator: most matrices at once
DEVICE_DECODE_BYTES = 112 * 2**20  # there, of a tile in two bytes a value and what it is computed from
WORK_BYTES = 12  # for a value, what a codec computes it from on the processor: codes as integers, values in fp32


class Matrix(Protocol):
    """The weight ``(rows, in)`` of a slice, present."""

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Its rows ``[start, stop)`` in the compute dtype, part by part, their columns as :meth:`arranged` has them;
        each is valid until the next."""
        ...

    def arranged(self, inputs: torch.Tensor) -> torch.Tensor:
        """*inputs* ``(m, in)`` in the order that the tiles' columns have."""
        ...

    @property
    def fused_rows(self) -> int:
        """Row blocks of at most so many rows go through :meth:`product`."""
        ...

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """*inputs* ``(m, in)`` times its transpose: ``(m, rows)``."""
        ...


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """A weight that is stored as numbers."""

    weight: torch.Tensor
    fused_rows: int = 0

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The whole."""
        yield 0, self.weight.shape[0], self.weight

    def arranged(self, inputs: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return inputs

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """As any matrix does."""
        return F.linear(inputs, self.weight)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Rows ``[first, last)`` of a quantised weight, decoded tile by tile into *scratch* where it has to be."""

    codec: Codec
    planes: Mapping[str, torch.Tensor]
    first: int
    last: int
    columns: int
    scratch: torch.Tensor
    fused_rows: int = 0

    def tiles(self, *, in_order: bool = False) -> Iterator[tuple[int, int, torch.Tensor]]:
        """As many rows at a time as the scratch has room for; with the columns *in_order* for other uses."""
        decode = self.codec.decode if in_order else self.codec.decode_arranged
        num_rows = self.last - self.first
        multiple = self.codec.row_step or num_rows
        step = min(num_rows, len(self.scratch) // self.columns // multiple * multiple)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            values = self.scratch[: (stop - start) * self.columns]
            by_columns = self.codec.columns_first
            tile = values.view(self.columns, -1).T if by_columns else values.view(-1, self.columns)
            decode(self.codec.cut(self.planes, num_rows, start, stop), self.first + start, tile)
            yield start, stop, tile

    def arranged(self, inputs: torch.Tensor) -> torch.Tensor:
        """As the codec likes to decode."""
        return self.codec.arranged(inputs)

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """By the codec's kernel."""
        return self.codec.product(self.planes, inputs, self.first)[:, : self.last - self.first]


def tile_rows(codec: Codec, rows: int, columns: int, tile_values: int = TILE_VALUES) -> int:
    """Of *rows* of a matrix, those that are decoded at a time."""
    step = codec.row_step
    most = min(tile_values, DEVICE_DECODE_BYTES // (2 + codec.work_bytes))
    return min(rows, max(step, most // columns // step * step)) if step else rows


def decode_bytes(source: PackedSource, dtype: torch.dtype, tile_values: int = TILE_VALUES) -> int:
    """What decoding takes: a tile in *dtype*, and what a codec computes it from."""
    rows, columns = source.shape
    values = tile_rows(source.codec, rows, columns, tile_values) * columns
    work = values * WORK_BYTES
    if tile_values > TILE_VALUES:  # on an accelerator
        work = min(work, max(values * source.codec.work_bytes, TILE_VALUES * WORK_BYTES))
    return values * dtype.itemsize + work


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

    def project(
        self, inputs: torch.Tensor, row_blocks: Sequence[Rows], output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(n, in)`` to ``(n, out)``, computed one of *row_blocks* at a time; what is padding may be anything. Into
        *output* if it is given, which need not have rows for padding at the end."""
        is_one_call = output is None and len(self.slices) == len(row_blocks) == 1
        if output is None:
            output = inputs.new_empty((inputs.shape[0], self.num_rows))
        for part in self.slices:
            with part.weights() as (matrix, bias):
                decoded = []
                for rows in row_blocks:
                    if rows.count > matrix.fused_rows:
                        decoded.append(slice(rows.start, rows.stop))
                        continue
                    found = matrix.product(inputs[rows.start : rows.used if inputs.is_cpu else rows.stop])
                    found = found if bias is None else found + bias
                    if is_one_call and len(found) == len(output):
                        return found
                    output[rows.start : rows.used, part.first : part.last] = found[: rows.used - rows.start]
                if not decoded:
                    continue
                arranged = matrix.arranged(inputs)
                for start, stop, weight in matrix.tiles():
                    if is_one_call and stop - start == self.num_rows:
                        return F.linear(arranged, weight, bias)
                    columns = slice(part.first + start, part.first + stop)
                    tile_bias = None if bias is None else bias[start:stop]
                    for block in decoded:
                        found = F.linear(arranged[block], weight, tile_bias)
                        output[block, columns] = found[: len(output) - block.start]
        return output

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """``(…, in)`` to ``(…, out)`` by the sweep's row blocks."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        context = current()
        # Rows of the sweep are (1, rows, in) or (rows, in). What else comes is latents, (1, 1, past + new, in), to be
        # expanded: at times as many as there are rows, and yet all of one sequence and none of them padding.
        is_sweep = inputs.dim() <= 3 and flat.shape[0] == context.num_rows
        if not is_sweep:
            blocks = [Rows(0, flat.shape[0], flat.shape[0])]
        elif inputs.is_cpu:
            blocks = context.rows_in_hand()
        else:  # a kernel has one shape there, whoever is in the block
            blocks = context.whole_rows()
        return self.project(flat, blocks).view(*inputs.shape[:-1], -1)

    def install(self, module: torch.nn.Module) -> None:
        """Make *module* compute this way."""
        module.forward = self.run


def lent(linear: SlicedLinear) -> SlicedLinear:
    """*linear*, whose weights all stay, for another model: nobody is told when it multiplies by them."""
    return SlicedLinear([LinearSlice(part.first, part.last, _kept(part)) for part in linear.slices])


def _kept(part: LinearSlice) -> SliceWeights:
    with part.weights() as weights:
        return partial(nullcontext, weights)


class JoinedLinears:
    """Linears that take the same input, with their weights in one matrix: the first that is called multiplies for all.

    Args:
        linear: the matrix, *rows* of each of them, one after the other.
    """

    def __init__(self, linear: SlicedLinear, rows: Sequence[int]) -> None:
        self._linear = linear
        self._rows = rows
        self._inputs: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def install(self, modules: Sequence[torch.nn.Module]) -> None:
        """Make *modules* compute this way."""
        first = 0
        for module, num_rows in zip(modules, self._rows, strict=True):
            module.forward = partial(self._run, first, first + num_rows)
            first += num_rows

    def _run(self, first: int, last: int, inputs: torch.Tensor) -> torch.Tensor:
        if self._output is None or self._inputs is not inputs:
            self._inputs, self._output = inputs, self._linear.run(inputs)
        output = self._output[..., first:last]
        if last == self._linear.num_rows:
            self._inputs = self._output = None
        return output


def padded_blocks(num_rows: int, block_rows: int) -> list[Rows]:
    """Row blocks of *block_rows* that cover *num_rows*, the last one reaching past the end."""
    return [Rows(at, at + block_rows, min(at + block_rows, num_rows)) for at in range(0, num_rows, block_rows)]

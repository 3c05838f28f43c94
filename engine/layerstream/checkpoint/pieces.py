"""Tensors that exist only as pieces of stored ones: what weight conversions do when they only move data.

Transformers' conversions stack experts, join gate and up projections, split fused ones. Each of these moves contiguous
runs of bytes, so the result is described by pieces and put together while it is read: no second copy on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from layerstream.checkpoint.header import TensorEntry


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``[source_offset, source_offset + num_bytes)`` of a stored tensor, and where they go."""

    entry: TensorEntry
    source_offset: int
    destination_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PiecedTensor:
    """A tensor of *shape* with *itemsize* bytes per value, put together from *pieces*."""

    shape: tuple[int, ...]
    itemsize: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.itemsize

    @classmethod
    def of(cls, entry: TensorEntry, itemsize: int) -> PiecedTensor:
        """A stored tensor as it lies."""
        return cls(entry.shape, itemsize, (Piece(entry, 0, 0, entry.extent.num_bytes),))

    def window(self, start: int, stop: int, destination: int) -> Iterator[Piece]:
        """The pieces of bytes ``[start, stop)``, going to *destination* on."""
        for piece in self.pieces:
            low = max(start, piece.destination_offset)
            high = min(stop, piece.destination_offset + piece.num_bytes)
            if low < high:
                source = piece.source_offset + low - piece.destination_offset
                yield Piece(piece.entry, source, destination + low - start, high - low)


def stack(tensors: Sequence[PiecedTensor]) -> PiecedTensor:
    """``(n, *shape)`` of n tensors of one shape."""
    first = tensors[0]
    pieces = [
        piece
        for index, tensor in enumerate(tensors)
        for piece in tensor.window(0, tensor.num_bytes, index * first.num_bytes)
    ]
    return PiecedTensor((len(tensors), *first.shape), first.itemsize, _merged(pieces))


def concatenate(tensors: Sequence[PiecedTensor], dim: int) -> PiecedTensor:
    """Tensors that differ only in size *dim*, one after the other along it."""
    first = tensors[0]
    dim %= len(first.shape)
    outer = prod(first.shape[:dim])
    runs = [tensor.num_bytes // outer for tensor in tensors]  # bytes of one outer index
    pieces: list[Piece] = []
    destination = 0
    for index in range(outer):
        for tensor, run in zip(tensors, runs, strict=True):
            pieces.extend(tensor.window(index * run, (index + 1) * run, destination))
            destination += run
    size = sum(tensor.shape[dim] for tensor in tensors)
    return PiecedTensor((*first.shape[:dim], size, *first.shape[dim + 1 :]), first.itemsize, _merged(pieces))


def split(tensor: PiecedTensor, sizes: Sequence[int], dim: int) -> list[PiecedTensor]:
    """Consecutive parts of *sizes* along *dim*: the inverse of :func:`concatenate`."""
    dim %= len(tensor.shape)
    outer = prod(tensor.shape[:dim])
    step = tensor.num_bytes // outer  # bytes of one outer index
    value_bytes = step // tensor.shape[dim]
    parts = []
    start = 0
    for size in sizes:
        run = size * value_bytes
        pieces = [
            piece
            for index in range(outer)
            for piece in tensor.window(index * step + start, index * step + start + run, index * run)
        ]
        shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
        parts.append(PiecedTensor(shape, tensor.itemsize, _merged(pieces)))
        start += run
    return parts


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Neighbours in source and destination as one piece."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.entry is piece.entry
            and last.source_offset + last.num_bytes == piece.source_offset
            and last.destination_offset + last.num_bytes == piece.destination_offset
        ):
            merged[-1] = Piece(
                last.entry, last.source_offset, last.destination_offset, last.num_bytes + piece.num_bytes
            )
        else:
            merged.append(piece)
    return tuple(merged)

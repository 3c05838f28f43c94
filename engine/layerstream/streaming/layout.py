"""How a unit lies in memory, and which reads put it there: pure layout, no I/O.

A tensor whose bytes lie in one piece is read *in place*: its whole pages go straight from the disk to where the
tensor will be used, so that the parameter is a view and nothing is copied. Tensors that are neighbours in a file
form one run. A tensor that has to be put together from pieces (fused experts), or that would be misaligned for its
dtype, is *assembled*: read into a reader thread's bounce buffer and copied from there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layerstream.checkpoint.names import ParameterSource
from layerstream.core.sizes import PAGE
from layerstream.hardware.reader import REQUEST_BYTES, ReadRequest

MAX_GAP = 64 * 1024  # bytes read for nothing rather than start another request


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a unit: the bytes ``[start, stop)`` of *source*, seen with *shape*."""

    key: str
    source: ParameterSource
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of this part."""
        return self.stop - self.start

    @classmethod
    def whole(cls, key: str, source: ParameterSource) -> Part:
        """All of *source*."""
        return cls(key, source, source.shape, 0, source.num_bytes)

    @classmethod
    def of_rows(cls, key: str, source: ParameterSource, first: int, last: int) -> Part:
        """Rows ``[first, last)`` of the leading dimension."""
        row_bytes = source.num_bytes // source.shape[0]
        return cls(key, source, (last - first, *source.shape[1:]), first * row_bytes, last * row_bytes)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies within its unit's memory."""

    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """A unit's memory: its size, where each tensor lies, and the reads that fill it."""

    name: str
    num_bytes: int
    weight_bytes: int
    places: dict[str, Place]
    requests: tuple[ReadRequest, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Contiguous bytes in a file and where they go within the unit."""

    path: Path
    offset: int
    num_bytes: int
    destination: int


def lay_out(name: str, parts: Sequence[Part], max_gap: int = MAX_GAP) -> UnitLayout:
    """Lay the *parts* of a unit out, page-aligned where they are read in place.

    Args:
        max_gap: bytes between neighbours that are read, and kept room for, rather than start another request.
    """
    in_place: list[tuple[Part, _Piece]] = []
    assembled: list[Part] = []
    for part in parts:
        piece = _in_place(part)
        if piece is None:
            assembled.append(part)
        else:
            in_place.append((part, piece))
    places: dict[str, Place] = {}
    requests: list[ReadRequest] = []
    cursor = 0
    for run in _runs(sorted((piece for _, piece in in_place), key=_position), max_gap):
        first = run[0].offset // PAGE * PAGE
        needed = run[-1].offset + run[-1].num_bytes - first
        length = -(-needed // PAGE) * PAGE
        for at in range(0, length, REQUEST_BYTES):
            size = min(REQUEST_BYTES, length - at)
            requests.append(ReadRequest(run[0].path, first + at, size, min(size, needed - at), cursor + at))
        for part, piece in in_place:
            if piece.path == run[0].path and run[0].offset <= piece.offset < first + needed:
                places[part.key] = _place(part, cursor + piece.offset - first)
        cursor += length
    pieces: list[_Piece] = []
    for part in assembled:
        places[part.key] = _place(part, cursor)
        pieces.extend(_pieces(part, cursor))
        cursor += -(-part.num_bytes // 64) * 64
    requests.extend(_bounced(pieces))
    weight_bytes = sum(part.num_bytes for part in parts)
    return UnitLayout(name, -(-cursor // PAGE) * PAGE, weight_bytes, places, tuple(requests))


def _in_place(part: Part) -> _Piece | None:
    """Where *part* lies if it is in one piece, and where its dtype may begin; else ``None``."""
    pieces = list(_pieces(part, 0))
    first = pieces[0] if pieces else None
    if first is None or first.offset % part.source.dtype.itemsize:
        return None
    follows = all(
        (piece.path, piece.offset - piece.destination) == (first.path, first.offset - first.destination)
        for piece in pieces
    )
    return _Piece(first.path, first.offset, part.num_bytes, 0) if follows else None


def _pieces(part: Part, base: int) -> Iterator[_Piece]:
    """The pieces of *part*, clipped to its byte range, with destinations counted from *base*."""
    stored = part.source.pieces
    first = max(0, bisect.bisect_right(stored, part.start, key=lambda piece: piece.destination_offset) - 1)
    for piece in stored[first:]:
        if piece.destination_offset >= part.stop:
            break
        start = max(part.start, piece.destination_offset)
        stop = min(part.stop, piece.destination_offset + piece.num_bytes)
        if start < stop:
            extent = piece.entry.extent
            offset = extent.offset + piece.source_offset + start - piece.destination_offset
            yield _Piece(extent.path, offset, stop - start, base + start - part.start)


def _place(part: Part, offset: int) -> Place:
    return Place(offset, part.num_bytes, part.source.dtype, part.shape)


def _position(piece: _Piece) -> tuple[str, int]:
    return str(piece.path), piece.offset


def _runs(pieces: Sequence[_Piece], max_gap: int = MAX_GAP) -> Iterator[list[_Piece]]:
    """Neighbours in a file, in groups that are worth one read."""
    run: list[_Piece] = []
    end = 0
    for piece in pieces:
        if run and (piece.path != run[0].path or piece.offset - end > max_gap):
            yield run
            run = []
        end = max(end, piece.offset + piece.num_bytes) if run else piece.offset + piece.num_bytes
        run.append(piece)
    if run:
        yield run


def _bounced(pieces: Sequence[_Piece]) -> Iterator[ReadRequest]:
    """Requests through a bounce buffer, each with the copies that it serves."""
    for run in _runs(sorted(pieces, key=_position)):
        starts = [piece.offset for piece in run]
        first = run[0].offset // PAGE * PAGE
        end = max(piece.offset + piece.num_bytes for piece in run)
        for at in range(first, end, REQUEST_BYTES):
            stop = min(at + REQUEST_BYTES, end)
            copies = []
            for piece in run[max(0, bisect.bisect_right(starts, at) - 1) : bisect.bisect_left(starts, stop)]:
                low, high = max(piece.offset, at), min(piece.offset + piece.num_bytes, stop)
                if low < high:
                    copies.append((low - at, piece.destination + low - piece.offset, high - low))
            length = -(-(stop - at) // PAGE) * PAGE
            yield ReadRequest(run[0].path, at, length, stop - at, None, tuple(copies))

"""The numbers of a sweep's rows as tensors on the devices that compute them, where kernels look them up.

They are the same for all layers that see alike, so they are made once for a sweep and go to each device in one copy.
Their shapes follow from the shapes of the row blocks, where nothing has to be gathered and no guesses compete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from layerstream.core.sight import Sight
from layerstream.kv.device_rows import Reading, SweepRows

ALIGNMENT = 8  # bytes


@dataclass(frozen=True, slots=True)
class ReadingTensors:
    """One call of a kernel.

    Attributes:
        reading: what it is made of.
        rows: the block's rows that attend, in order, as a slice where they are neighbours; ``None``: all.
        query_ends: ``(n + 1,)`` int32: where each query begins among them, and the end.
        key_begins: ``(n + 1,)`` int32: the pool's row, or the gathered one, with each query's first key.
        lengths: ``(n,)`` int32: keys of each query.
        keys: pool rows of keys to be gathered, int64; ``None``: they are where they are.
        most_rows: of a query.
        tiles: what :mod:`layerstream.model.padded_attention` makes of them, by the row that it begins with.
        repeated: ends of queries of which each has so many times the rows.
    """

    reading: Reading
    rows: torch.Tensor | slice | None
    query_ends: torch.Tensor
    key_begins: torch.Tensor
    lengths: torch.Tensor
    keys: torch.Tensor | None
    most_rows: int
    tiles: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    repeated: dict[int, torch.Tensor] = field(default_factory=dict)

    def ends(self, times: int) -> torch.Tensor:
        """``(n + 1,)`` int32: where queries end that have *times* as many rows."""
        if times == 1:
            return self.query_ends
        if times not in self.repeated:
            self.repeated[times] = self.query_ends * times
        return self.repeated[times]


@dataclass(frozen=True, slots=True)
class MoveTensors:
    """Guesses of one block that are put in place: its rows, and those of the pool."""

    block: int
    rows: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class WaveTensors:
    """What is put in place, and the calls after that, by what a layer sees."""

    moves: tuple[MoveTensors, ...]
    calls: dict[Sight, tuple[ReadingTensors, ...]]


@dataclass(frozen=True, slots=True)
class BlockTensors:
    """A row block: the pool's rows that its rows are written to, int64, and its waves."""

    targets: torch.Tensor
    waves: tuple[WaveTensors, ...]


class SweepNumbers:
    """What every block of *rows* needs for layers that see as *sights* say, about to cross."""

    def __init__(self, rows: SweepRows, sights: Iterable[Sight]) -> None:
        sights = tuple(dict.fromkeys(sights))
        self._crossing = _Crossing()
        self._made = [_Block(rows, number, sights, self._crossing) for number in range(len(rows.blocks))]

    @property
    def is_plain(self) -> bool:
        """Whether their shapes and what is called with them are those of the blocks: rows that stand alone, in one
        call, and keys that lie where they lie."""
        return all(block.is_plain for block in self._made)

    def go(self, device: torch.device, room: torch.Tensor | None = None) -> tuple[BlockTensors, ...]:
        """Copy them to *device*, into *room* if numbers of such blocks are there already."""
        self._crossing.go(device, room)
        return tuple(block.tensors() for block in self._made)

    @property
    def there(self) -> torch.Tensor:
        """All of them, where they are now."""
        return self._crossing.there


class _Block:
    """A block whose numbers are about to cross."""

    def __init__(self, rows: SweepRows, number: int, sights: Sequence[Sight], crossing: _Crossing) -> None:
        block = rows.blocks[number]
        self._targets = crossing.add(block.targets, torch.int64)
        self._waves = [
            (
                _moves(wave.moves, crossing),
                {s: [_Call(call, crossing) for call in rows.readings(number, turn, s)] for s in sights},
            )
            for turn, wave in enumerate(block.waves)
        ]

    @property
    def is_plain(self) -> bool:
        """As of all blocks."""
        (moves, by_sight), *others = self._waves
        is_one_call = all(len(calls) == 1 and calls[0].is_plain for calls in by_sight.values())
        return not moves and not others and is_one_call

    def tensors(self) -> BlockTensors:
        waves = (
            WaveTensors(
                tuple(MoveTensors(block, source(), target()) for block, source, target in moves),
                {sight: tuple(call.tensors() for call in calls) for sight, calls in by_sight.items()},
            )
            for moves, by_sight in self._waves
        )
        return BlockTensors(self._targets(), tuple(waves))


class _Call:
    """A call whose numbers are about to cross."""

    def __init__(self, reading: Reading, crossing: _Crossing) -> None:
        queries = reading.queries
        self._reading = reading
        self._rows = None if reading.is_whole else _rows(reading, crossing)
        self._ends = crossing.add([0, *accumulate(query.count for query in queries)], torch.int32)
        self._keys: _Crossed | None = None
        if reading.is_gathered:
            begins = list(accumulate((query.length for query in queries), initial=0))
            pieces = [torch.arange(first, first + n) for query in queries for first, n in query.keys]
            self._keys = crossing.add_tensor(torch.cat(pieces))
        else:
            begins = [*(query.begin for query in queries), queries[-1].begin + queries[-1].length]
        self._begins = crossing.add(begins, torch.int32)
        self._lengths = crossing.add([query.length for query in queries], torch.int32)

    @property
    def is_plain(self) -> bool:
        """As of all blocks."""
        return self._reading.is_whole

    def tensors(self) -> ReadingTensors:
        return ReadingTensors(
            self._reading,
            self._rows() if isinstance(self._rows, _Crossed) else self._rows,
            self._ends(),
            self._begins(),
            self._lengths(),
            None if self._keys is None else self._keys(),
            max(query.count for query in self._reading.queries),
        )


def _rows(reading: Reading, crossing: _Crossing) -> _Crossed | slice:
    rows = reading.rows
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return crossing.add(rows, torch.int64)


def _moves(moves: Sequence[tuple[int, int, int]], crossing: _Crossing) -> list[tuple[int, _Crossed, _Crossed]]:
    by_block: dict[int, list[tuple[int, int]]] = {}
    for block, row, target in moves:
        by_block.setdefault(block, []).append((row, target))
    return [
        (
            block,
            crossing.add([row for row, _ in some], torch.int64),
            crossing.add([target for _, target in some], torch.int64),
        )
        for block, some in by_block.items()
    ]


class _Crossing:
    """Vectors of whole numbers that cross to a device as one."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, torch.Tensor]] = []
        self._num_bytes = 0
        self._there: torch.Tensor | None = None

    def add(self, numbers: Sequence[int], dtype: torch.dtype) -> _Crossed:
        return self.add_tensor(torch.tensor(numbers, dtype=dtype))

    def add_tensor(self, numbers: torch.Tensor) -> _Crossed:
        start, num_bytes = self._num_bytes, numbers.numel() * numbers.itemsize
        self._parts.append((start, numbers))
        self._num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return _Crossed(self, start, num_bytes, numbers.dtype)

    def go(self, device: torch.device, room: torch.Tensor | None) -> None:
        """Copy them all, into *room* if there is one; what was added can be had from now on. Nobody waits for what is
        computed there: memory that is not pinned is read before a copy of it is queued."""
        packed = torch.zeros(self._num_bytes, dtype=torch.uint8)
        for start, numbers in self._parts:
            packed[start : start + numbers.numel() * numbers.itemsize].view(numbers.dtype).copy_(numbers)
        if room is None:
            self._there = packed.to(device, non_blocking=True)
        else:
            self._there = room.copy_(packed, non_blocking=True)

    @property
    def there(self) -> torch.Tensor:
        """What crossed."""
        assert self._there is not None, "it has not crossed yet"
        return self._there

    def part(self, start: int, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        """A vector where it is now."""
        return self.there[start : start + num_bytes].view(dtype)


@dataclass(frozen=True, slots=True)
class _Crossed:
    """A vector of a crossing, once that is over."""

    crossing: _Crossing
    start: int
    num_bytes: int
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        return self.crossing.part(self.start, self.num_bytes, self.dtype)

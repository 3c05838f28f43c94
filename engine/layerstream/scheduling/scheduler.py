"""Decides what goes into the next sweep. Pure: it moves no tensor and reads no clock.

The one invariant that covers chunking and decoding alike: a sequence has ``num_computed`` tokens in its pages, and a
sweep carries some of ``token_ids[num_computed:]``, in order, without gaps. When the last known token is among them,
the sequence is sampled.

Rules:

* a sequence is admitted when the pages for its longest possible answer are free, in order of arrival, so that it never
  has to stop half-way; until then it waits;
* every admitted sequence whose prompt is computed gets its newest token into every sweep; such rows share row blocks
  of ``decode_rows`` rows, padded;
* prompts are computed in chunks of ``chunk_tokens`` counted from position 0 (the remainder is a chunk of its own), as
  many as the token budget has room for after the decode rows, in order of arrival, at least one per sweep;
* a removed sequence is in no later sweep and its pages are free at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from layerstream.kv.pages import PagePool
from layerstream.sequence import Sequence
from layerstream.sweep import RowBlock, Span, Sweep


@dataclass(frozen=True, slots=True)
class SweepLimits:
    """Constants of the plan that shape every sweep.

    Attributes:
        max_tokens: token budget of one sweep.
        chunk_tokens: prompt tokens per row block.
        decode_rows: rows per row block of decoding sequences.
        one_sequence_per_block: never put rows of two sequences into one row block.
    """

    max_tokens: int = 512
    chunk_tokens: int = 128
    decode_rows: int = 16
    one_sequence_per_block: bool = False


class Scheduler:
    """Holds the waiting and the running sequences."""

    def __init__(self, limits: SweepLimits, pool: PagePool) -> None:
        self.limits = limits
        self.pool = pool
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that were not admitted yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Let *sequence* wait for its pages. The caller made sure that the pool as a whole could hold it."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """*sequence* is finished, cancelled or failed: forget it and free its pages."""
        if sequence in self._running:
            self._running.remove(sequence)
            self.pool.release(sequence.pages)
            sequence.pages = []
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> Sweep | None:
        """The next sweep, or ``None`` when nothing is there to run."""
        self._admit()
        decoding = [sequence for sequence in self._running if sequence.is_prefilled]
        blocks = self._decode_blocks(decoding)
        sampled = list(decoding)
        room = self.limits.max_tokens - len(decoding)
        for sequence in self._running:
            if not sequence.is_prefilled and (room > 0 or not blocks):
                chunks = self._chunks(sequence, room if blocks else max(room, 1))
                blocks.extend(chunks)
                room -= sum(block.num_rows for block in chunks)
                if chunks and chunks[-1].spans[0].stop == sequence.num_tokens:
                    sampled.append(sequence)
        return Sweep(tuple(blocks), tuple(sampled)) if blocks else None

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless pages and page tables account for each other."""
        self.pool.check_integrity([sequence.pages for sequence in self._running])
        assert not any(sequence.pages for sequence in self._waiting), "a waiting sequence holds pages"

    def _admit(self) -> None:
        while self._waiting:
            pages = self.pool.acquire(self.pool.pages_for(self._waiting[0].max_num_tokens))
            if pages is None:
                return
            sequence = self._waiting.popleft()
            sequence.pages = pages
            self._running.append(sequence)

    def _decode_blocks(self, decoding: list[Sequence]) -> list[RowBlock]:
        per_block = 1 if self.limits.one_sequence_per_block else self.limits.decode_rows
        spans = [Span(sequence, sequence.num_computed, sequence.num_tokens) for sequence in decoding]
        return [
            RowBlock(tuple(spans[at : at + per_block]), self.limits.decode_rows)
            for at in range(0, len(spans), per_block)
        ]

    def _chunks(self, sequence: Sequence, room: int) -> list[RowBlock]:
        """Chunks of *sequence* that start within the next *room* tokens."""
        blocks = []
        start, size = sequence.num_computed, self.limits.chunk_tokens
        while start < sequence.num_tokens and room > 0:
            stop = min(start // size * size + size, sequence.num_tokens)
            blocks.append(RowBlock((Span(sequence, start, stop),), stop - start))
            room -= stop - start
            start = stop
        return blocks

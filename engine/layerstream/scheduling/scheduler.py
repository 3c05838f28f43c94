"""Decides what goes into the next sweep. Pure: it moves no tensor and reads no clock.

The one invariant that covers chunking and decoding alike: a sequence has ``num_computed`` tokens in its pages, and a
sweep carries some of ``token_ids[num_computed:]``, in order, without gaps. When the last known token is among them,
the sequence is sampled.

Rules:

* a sequence is admitted when the pages for its longest possible answer are free, in order of arrival, so that it never
  has to stop half-way; until then it waits. Pages of its prompt that others have computed, or are going to, it shares;
  prefixes that nobody uses any more are evicted when their pages are wanted;
* a sequence that shares pages still to be computed goes along in the very sweep that computes them, in later row
  blocks: every layer appends a block's KV before it turns to the next block. Owners are older than sharers, so the
  oldest sequence never waits for another;
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
from layerstream.kv.prefix import PrefixTable
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
        assert limits.chunk_tokens == pool.page_tokens, "a page holds one chunk"
        self.limits = limits
        self.pool = pool
        self.prefixes = PrefixTable(pool)
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
        sequence.prefix_keys = self.prefixes.keys_of(sequence.token_ids[: sequence.num_prompt_tokens])
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """*sequence* is finished, cancelled or failed: forget it and free its pages."""
        if sequence in self._running:
            self._running.remove(sequence)
            self.prefixes.abandon(sequence.prefix_keys, sequence, self._running)
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
        planned: dict[Sequence, int] = {}
        for sequence in self._running:
            if sequence.is_prefilled or self._is_ahead(sequence, planned):
                continue
            if room > 0 or not blocks:
                chunks = self._chunks(sequence, room if blocks else max(room, 1))
                blocks.extend(chunks)
                planned[sequence] = chunks[-1].spans[0].stop
                room -= sum(block.num_rows for block in chunks)
                if planned[sequence] == sequence.num_tokens:
                    sampled.append(sequence)
        return Sweep(tuple(blocks), tuple(sampled)) if blocks else None

    def commit(self, sweep: Sweep) -> None:
        """The rows of *sweep* are in their pages: sequences advance, and whole pages of prompts may be shared."""
        for _, span in sweep.spans():
            span.sequence.num_computed = span.stop
        for sequence in {span.sequence for _, span in sweep.spans()}:
            self.prefixes.publish(sequence.prefix_keys, sequence)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless pages, page tables and prefixes account for each other."""
        self.prefixes.check_integrity()
        self.pool.check_integrity([*(sequence.pages for sequence in self._running), self.prefixes.held_pages()])
        assert not any(sequence.pages for sequence in self._waiting), "a waiting sequence holds pages"

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0]
            shared = self.prefixes.match(sequence.prefix_keys)
            self.pool.share(shared)
            own = self._acquire(self.pool.pages_for(sequence.max_num_tokens) - len(shared), shared)
            if own is None:
                self.pool.release(shared)
                return
            self._running.append(self._waiting.popleft())
            sequence.pages = shared + own
            sequence.num_computed = sequence.num_cached = len(shared) * self.pool.page_tokens
            self.prefixes.enter(sequence.prefix_keys, len(shared), sequence)

    def _acquire(self, count: int, shared: list[int]) -> list[int] | None:
        missing = count - self.pool.num_free
        if missing > 0 and self.prefixes.num_idle >= missing:
            self.prefixes.evict(missing)
        return self.pool.acquire(count, after=shared[-1] if shared else None)

    def _is_ahead(self, sequence: Sequence, planned: dict[Sequence, int]) -> bool:
        """Whether *sequence* shares pages that are neither computed nor planned for the sweep so far."""
        size = self.pool.page_tokens
        return any(
            planned.get(owner, owner.num_computed) < (position + 1) * size
            for position, owner in self.prefixes.owners(sequence.prefix_keys[: sequence.num_computed // size])
        )

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

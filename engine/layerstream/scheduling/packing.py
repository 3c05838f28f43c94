"""Spans into row blocks. Their shapes are the plan's, whoever is in them, so a sequence's bits are its own."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from layerstream.core.draft import DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span


@dataclass(frozen=True, slots=True)
class SweepLimits:
    """Constants of the plan that shape every sweep.

    Attributes:
        max_tokens: token budget of one sweep.
        chunk_tokens: prompt tokens that attend together.
        decode_rows: rows per row block of decoding sequences.
        prompt_rows: rows per row block of prompts, padded; 0: every chunk is a row block of its own size.
        one_sequence_per_block: never put rows of two sequences into one row block.
        max_draft_rows: guesses in one sweep.
        max_sequences: sequences that run at once; each has logits of its own in a sweep.
    """

    max_tokens: int = 512
    chunk_tokens: int = 128
    decode_rows: int = 32
    prompt_rows: int = 0
    one_sequence_per_block: bool = False
    max_draft_rows: int = 128
    max_sequences: int = 256

    @property
    def rows_per_block(self) -> int:
        """Spans that a decode block takes."""
        return 1 if self.one_sequence_per_block else self.decode_rows


def decode_spans(sequence: Sequence) -> list[Span]:
    """One for each token behind the prompt that is still to be computed."""
    first = max(sequence.num_computed, sequence.num_prompt_tokens)
    return [Span(sequence, position, position + 1) for position in range(first, sequence.num_tokens)]


def draft_spans(sequence: Sequence, tree: DraftTree) -> list[Span]:
    """One for each guess, at the position that it is a guess at."""
    newest = sequence.num_tokens - 1
    return [Span(sequence, newest + depth, newest + depth + 1, node) for node, depth in enumerate(tree.depths)]


def decode_blocks(spans: Seq[Span], limits: SweepLimits) -> list[RowBlock]:
    """*spans* of one row each in padded row blocks."""
    size = limits.rows_per_block
    return [RowBlock(tuple(spans[at : at + size]), limits.decode_rows) for at in range(0, len(spans), size)]


class PromptBlocks:
    """Row blocks that chunks fill in their order: a chunk may attend to those before it in the same block.

    Args:
        most: tokens at most; a chunk that begins within them is in.
        free: tokens that cost nothing. Where chunks share blocks, they get as many whole blocks, one at the least.
    """

    def __init__(self, limits: SweepLimits, most: int, free: int) -> None:
        is_shared = limits.prompt_rows > 0 and not limits.one_sequence_per_block
        self._block_rows = limits.prompt_rows if is_shared else limits.chunk_tokens if limits.prompt_rows else 0
        self._is_shared = is_shared
        self._tokens_left = most if is_shared else min(most, free)
        self._blocks_left = max(1, free // limits.prompt_rows) if is_shared and free < most else most
        self._rows_left = 0
        self._blocks: list[list[Span]] = []

    def has_room(self, num_rows: int) -> bool:
        """Whether a chunk of *num_rows* may be added."""
        return self._tokens_left > 0 and (num_rows <= self._rows_left or self._blocks_left > 0)

    def add(self, chunk: Span) -> None:
        """Put *chunk* behind the others."""
        if len(chunk) > self._rows_left or not self._is_shared:
            if self._is_shared:
                self._tokens_left -= self._rows_left
            self._blocks.append([])
            self._blocks_left -= 1
            self._rows_left = self._block_rows or len(chunk)
        self._blocks[-1].append(chunk)
        self._rows_left -= len(chunk)
        self._tokens_left -= len(chunk) if self._is_shared else self._block_rows or len(chunk)  # padding computes too

    def blocks(self) -> list[RowBlock]:
        """What there is by now."""
        return [RowBlock(tuple(spans), self._block_rows or sum(map(len, spans))) for spans in self._blocks]

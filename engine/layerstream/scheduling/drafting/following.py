"""What a sweep leaves to a multi-token-prediction head, and how its rows are put into sweeps of its own. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from layerstream.core.draft import ROOT
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.scheduling.packing import PromptBlocks, SweepLimits


@dataclass(slots=True)
class Computed:
    """Rows that a sweep computed of one sequence.

    Attributes:
        start: the token that the first of them is of; the others follow.
        rows: packed rows: of known tokens, then of guesses that were right.
        sources: who guessed those.
    """

    start: int
    rows: list[int] = field(default_factory=list[int])
    sources: list[str] = field(default_factory=list[str])


def find_computed(sweep: Sweep) -> dict[Sequence, Computed]:
    """What *sweep* computed of each of its sequences, once it is known which guesses were right."""
    found: dict[Sequence, Computed] = {}
    nodes: dict[tuple[Sequence, int], int] = {}
    for row, span in sweep.spans():
        if span.node != ROOT:
            nodes[span.sequence, span.node] = row
        else:
            found.setdefault(span.sequence, Computed(span.start)).rows.extend(range(row, row + len(span)))
    for sequence, tree in sweep.drafts.items():
        computed = found[sequence]
        known = computed.start + len(computed.rows)
        right = tree.along(sequence.token_ids[known : sequence.num_computed])
        computed.rows.extend(nodes[sequence, node] for node in right)
        computed.sources.extend(tree.sources[node] for node in right)
    return found


def cut(spans: Seq[Span], limits: SweepLimits) -> Iterator[list[Span]]:
    """*spans* a sweep's worth at a time, in order, as chunks: within tokens, and within sequences with logits."""
    part: list[Span] = []
    left, num_left = limits.max_tokens, limits.max_sequences
    for span in spans:
        start = span.start
        while start < span.stop:
            if left <= 0 or not num_left:
                yield part
                part, left, num_left = [], limits.max_tokens, limits.max_sequences
            count = min(span.stop - start, left, limits.chunk_tokens - start % limits.chunk_tokens)
            part.append(Span(span.sequence, start, start + count))
            start += count
            left -= max(count, limits.decode_rows) if limits.one_sequence_per_block else count
            num_left -= 1
    if part:
        yield part


def pack(spans: Seq[Span], limits: SweepLimits) -> tuple[RowBlock, ...]:
    """Short spans side by side in blocks of decode rows, others as prompts are packed."""
    prompts = PromptBlocks(limits, limits.max_tokens, limits.max_tokens)
    short: list[list[Span]] = []
    left = 0
    for span in spans:
        if len(span) > limits.decode_rows:
            prompts.add(span)
            continue
        if len(span) > left or limits.one_sequence_per_block:
            short.append([])
            left = limits.decode_rows
        short[-1].append(span)
        left -= len(span)
    return (*prompts.blocks(), *(RowBlock(tuple(group), limits.decode_rows) for group in short))

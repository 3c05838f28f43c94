"""A :class:`Sweep`: the rows that one pass over all layers carries, cut into row blocks of fixed shape.

A row's bits depend on the shape a kernel is called with, not on what the other rows hold (design: "fixed row
blocks"). So everything that computes rows does it one :class:`RowBlock` after the other, and a block's shape
follows from its own rows alone: a prompt's chunk counted from position 0, its remainder, or a block of decode
rows padded to a constant. A request's answer then does not depend on its neighbours.

A generated token is always a decode row, a span of its own that attends alone: whether it was sampled one sweep
earlier, forced by a grammar or guessed by a drafter, its kernels are called with the same shapes, and its bits are the
same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from layerstream.api.reading import HiddenState
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.passages import Move
from layerstream.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``[start, stop)`` of one sequence, as neighbouring rows; or the one token of a node of its draft."""

    sequence: Sequence
    start: int
    stop: int
    node: int = ROOT

    @property
    def is_drafted(self) -> bool:
        """Whether it is a guess: its KV is not in the pages until it is accepted."""
        return self.node != ROOT

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows computed together: spans, then padding up to ``num_rows``."""

    spans: tuple[Span, ...]
    num_rows: int

    @property
    def is_prompt(self) -> bool:
        """Whether it computes a prompt; otherwise generated and guessed tokens."""
        return self.spans[0].start < self.spans[0].sequence.num_prompt_tokens

    def spans_from(self, row: int) -> Iterator[tuple[int, Span]]:
        """Its spans with the row that each starts at, the block starting at *row*."""
        for span in self.spans:
            yield row, span
            row += len(span)

    @property
    def num_used(self) -> int:
        """Rows at the beginning that belong to somebody."""
        return sum(map(len, self.spans))

    @property
    def num_padding(self) -> int:
        """Rows at the end that belong to nobody."""
        return self.num_rows - self.num_used


@dataclass(frozen=True, slots=True)
class PageLoad:
    """A page whose KV lies on disk under *key* and is brought to frame *page* while the sweep goes on; or states of
    recurrent layers, brought to slot *page*."""

    key: bytes
    page: int


@dataclass(frozen=True, slots=True)
class StateRoute:
    """How the states of recurrent layers go through a sweep, for one sequence.

    Attributes:
        start: tokens that are in the state that it begins with.
        source: the slot that state is in; ``None``: there were no tokens.
        stops: ``(tokens, slot)``, ascending: the state after so many tokens is left in that slot. The last one is the
            state after all known tokens of the sweep.
    """

    start: int
    source: int | None
    stops: tuple[tuple[int, int], ...]

    def before(self, token: int) -> int | None:
        """The slot that has the state before *token* when its row is computed; ``None``: there is none yet."""
        return self.source if token == self.start else self.after(token)

    def after(self, token: int) -> int:
        """The slot that takes the state after tokens up to *token*: whatever is left there later lies further on."""
        return next(slot for stop, slot in self.stops if stop >= token)

    @property
    def target(self) -> int:
        """The slot with the state after all of it."""
        return self.stops[-1][1]


class SweepFailed(Exception):
    """What some rows need is not to be had; the sweep had no effect, and one without them may go well.

    Attributes:
        sequences: whose rows they are.
        error: what happened.
    """

    def __init__(self, sequences: frozenset[Sequence], error: Exception) -> None:
        super().__init__(str(error))
        self.sequences = sequences
        self.error = error


@dataclass(frozen=True)
class Sweep:
    """Row blocks in order, the sequences that are sampled, and the stored pages that the rows need.

    A sequence appears in ``sampled`` exactly when its last known token is among the rows and its logits are wanted; one
    whose hidden states are wanted appears in ``read_rows``. ``drafts`` has trees of
    some of them; a row is there for every node. ``routes`` says where the states of recurrent layers are, for every
    sequence, if the model has such layers; ``state_loads`` which of them have to be brought. ``moves`` says which
    tokens of blended prompts are had from elsewhere: in every layer, before the first row of their sequence. Of a
    sequence in ``staying``, those tokens have rows all the same, of which so many stay to the last layer: the ones that
    differ most.
    """

    blocks: tuple[RowBlock, ...]
    sampled: tuple[Sequence, ...]
    loads: tuple[PageLoad, ...] = ()
    drafts: Mapping[Sequence, DraftTree] = field(default_factory=dict)
    routes: Mapping[Sequence, StateRoute] = field(default_factory=dict)
    state_loads: tuple[PageLoad, ...] = ()
    moves: Mapping[Sequence, tuple[Move, ...]] = field(default_factory=dict)
    staying: Mapping[Sequence, int] = field(default_factory=dict)

    @cached_property
    def num_rows(self) -> int:
        """Rows of all blocks, padding included."""
        return sum(block.num_rows for block in self.blocks)

    @cached_property
    def num_tokens(self) -> int:
        """Rows of known tokens."""
        return sum(len(span) for _, span in self.known_spans())

    @cached_property
    def num_drafted(self) -> int:
        """Rows of guesses."""
        return sum(map(len, self.drafts.values()))

    @cached_property
    def num_prompt_rows(self) -> int:
        """Rows of blocks that compute prompts."""
        return sum(block.num_rows for block in self.blocks if block.is_prompt)

    @cached_property
    def num_decode_blocks(self) -> int:
        """Blocks of generated and guessed tokens."""
        return sum(not block.is_prompt for block in self.blocks)

    @cached_property
    def num_decode_rows(self) -> int:
        """Rows of generated and guessed tokens."""
        return sum(block.num_used for block in self.blocks if not block.is_prompt)

    @cached_property
    def sampled_rows(self) -> tuple[int, ...]:
        """The packed rows that need logits: for each of ``sampled`` its last token's, then its nodes' in order."""
        last: dict[tuple[Sequence, int], int] = {}
        for row, span in self.spans():
            last[span.sequence, span.node] = row + len(span) - 1
        return tuple(last[s, node] for s in self.sampled for node in range(ROOT, len(self.drafts.get(s, ()))))

    def logit_rows(self) -> Iterator[tuple[Sequence, slice]]:
        """Which rows of the logits belong to each of ``sampled``: its last token, then its nodes."""
        at = 0
        for sequence in self.sampled:
            count = 1 + len(self.drafts.get(sequence, ()))
            yield sequence, slice(at, at + count)
            at += count

    def read_rows(self) -> Iterator[tuple[Span, slice]]:
        """The packed rows whose final hidden states are wanted, with the spans that they are of."""
        for row, span in self.known_spans():
            reading = span.sequence.reading
            if not isinstance(reading, HiddenState):
                continue
            if reading.pooling == "mean":
                yield span, slice(row, row + len(span))
            elif span.stop == span.sequence.num_tokens:
                yield span, slice(row + len(span) - 1, row + len(span))

    @cached_property
    def ended(self) -> tuple[Sequence, ...]:
        """Whose last known token is among the rows."""
        read = [span.sequence for span, _ in self.read_rows() if span.stop == span.sequence.num_tokens]
        return (*self.sampled, *read)

    def token_ids(self, span: Span) -> list[int]:
        """The tokens of *span*."""
        if span.is_drafted:
            return [self.drafts[span.sequence].token_ids[span.node]]
        return span.sequence.token_ids[span.start : span.stop]

    def spans(self) -> Iterator[tuple[int, Span]]:
        """Every span with the packed row that it starts at."""
        row = 0
        for block in self.blocks:
            yield from block.spans_from(row)
            row += block.num_rows

    def known_spans(self) -> Iterator[tuple[int, Span]]:
        """Those that are not guesses."""
        return ((row, span) for row, span in self.spans() if not span.is_drafted)

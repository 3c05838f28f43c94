"""What a module needs to know about the sweep that runs through it, kept in a ``ContextVar``.

A keyword argument would be dropped by some families' layers; a context variable reaches every module.

Invariant: ``active`` always describes the rows of the tensors in hand: all row blocks while the model's own forward
passes packed rows along, exactly one inside a row block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.kv.drafted import DraftedRows
from layerstream.kv.on_device import DeviceKV
from layerstream.kv.state import Neighbours, PagedRows

if TYPE_CHECKING:
    from layerstream.model.blending import Blend
    from layerstream.model.grouped_experts import Routed
    from layerstream.model.leaving import Fewer
    from layerstream.model.routing import Routing
    from layerstream.model.traced import LayerTrace


@dataclass(frozen=True, slots=True)
class Rows:
    """A row block as rows ``[start, stop)`` of a tensor; from *used* on they are padding."""

    start: int
    stop: int
    used: int

    @property
    def count(self) -> int:
        """With padding."""
        return self.stop - self.start


@dataclass(slots=True)
class SweepContext:
    """The sweep under way.

    Attributes:
        layers: what each layer caches, attends to and sees.
        chunk_tokens: prompt tokens that attend together (:meth:`attended`); 0: spans attend as they are.
        states: the KV of each layer that caches, where it is computed with.
        reach: returns when what the sweep reads of one of them is there; ``None``: all of it is.
        active: the row blocks in hand, each with the row that it starts at.
        masks: attention masks of this sweep, by what they depend on.
        neighbours: which pages lie side by side, as :meth:`PagedRows.read` has found it.
        crossed: what all layers are given alike, as it crossed to other devices: by identity and device, beside the
            original.
        rotations: what heads are multiplied by at the sweep's positions (:mod:`layerstream.model.rotary`).
        blend: what is moved within the pages; ``None``: nothing.
        fewer: the rows that stayed, once some have left; ``None``: none have.
        drafted: keys and values of the sweep's guesses, where the processor computes.
        routing: what the row blocks of the block in hand ask their experts, while that is being found out.
        routed: what routers said on accelerators, to be checked when the sweep is over.
        pools: the KV on accelerators; ``None``: the processor computes.
        has_counted: whether anybody asked where padding begins.
        prefers_flash: on an accelerator, attend with the flash-attn package where it can.
    """

    sweep: Sweep
    layers: Seq[LayerTrace]
    states: Seq[PagedRows]
    reach: Callable[[int], None] | None = None
    pools: DeviceKV | None = None
    prefers_flash: bool = False
    chunk_tokens: int = 0
    active: list[tuple[int, RowBlock]] = field(default_factory=list)
    masks: dict[Any, torch.Tensor] = field(default_factory=dict[Any, torch.Tensor])
    neighbours: dict[Any, Neighbours] = field(default_factory=dict[Any, Neighbours])
    crossed: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rotations: dict[Any, Any] = field(default_factory=dict[Any, Any])
    blend: Blend | None = None
    fewer: Fewer | None = None
    drafted: DraftedRows = field(init=False)
    routing: Routing | None = None
    routed: list[Routed] = field(default_factory=list["Routed"])
    has_counted: bool = False

    def __post_init__(self) -> None:
        self.drafted = DraftedRows(self.sweep.drafts)
        row = 0
        for block in self.sweep.blocks:
            self.active.append((row, block))
            row += block.num_rows

    def state(self, number: int) -> PagedRows:
        """The KV of a layer, with what this sweep reads in it."""
        if self.reach is not None:
            self.reach(number)
        return self.states[number]

    def attended(self, span: Span) -> tuple[int, int]:
        """Positions ``[start, stop)`` that *span* attends in the shape of: those of its chunk, whichever of them it has
        and wherever the prompt ends, if it is of a prompt; else its own. So it is behind a passage that may be moved,
        where bits depend on what was."""
        sequence = span.sequence
        is_blended = bool(sequence.passages) and span.start >= sequence.passages[0].start
        if not self.chunk_tokens or span.start >= sequence.num_prompt_tokens or is_blended:
            return span.start, span.stop
        start = span.start - span.start % self.chunk_tokens
        return start, start + self.chunk_tokens

    def is_moving(self, number: int, sequence: Sequence) -> bool:
        """Whether rows of *sequence* are moved in the layer that caches in state *number*: then what lies behind its
        spans is in place already."""
        return self.blend is not None and self.blend.moves(number, sequence)

    @property
    def num_rows(self) -> int:
        """Rows in hand."""
        row, block = self.active[-1]
        return row + block.num_rows

    @property
    def is_single_block(self) -> bool:
        """Whether the rows in hand are one row block."""
        return len(self.active) == 1

    def spans(self) -> Iterator[tuple[int, Span]]:
        """The spans in hand, each with the row that it starts at."""
        for row, block in self.active:
            yield from block.spans_from(row)

    def rows_in_hand(self) -> list[Rows]:
        """The row blocks in hand."""
        self.has_counted = True
        return [Rows(row, row + block.num_rows, row + block.num_used) for row, block in self.active]

    def whole_rows(self) -> list[Rows]:
        """The row blocks in hand, for who does not care where padding begins: all of it is computed."""
        return [Rows(row, row + block.num_rows, row + block.num_rows) for row, block in self.active]

    @property
    def num_padding(self) -> int:
        """Of the row block in hand."""
        self.has_counted = True
        return self.active[0][1].num_padding

    def row_blocks(self) -> Iterator[slice]:
        """Go through the row blocks in hand; while one is yielded, it is the only active one."""
        whole = self.active
        try:
            for row, block in whole:
                self.active = [(0, block)]
                yield slice(row, row + block.num_rows)
        finally:
            self.active = whole


_CURRENT: ContextVar[SweepContext] = ContextVar("layerstream_sweep")


def current() -> SweepContext:
    """The sweep under way; ``LookupError`` outside of one."""
    return _CURRENT.get()


@contextmanager
def sweeping(context: SweepContext) -> Iterator[SweepContext]:
    """Make *context* the current one."""
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)

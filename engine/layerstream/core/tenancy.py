"""A :class:`Tenancy`: what a sequence has of the memory for KV, and how far its KV has come.

Only :mod:`layerstream.scheduling` writes it. Everybody else reads it, mostly through the properties of
:class:`~layerstream.core.sequence.Sequence`, and asks the scheduler for changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Suspension:
    """What a sequence had computed when its memory was taken.

    Attributes:
        num_computed: tokens.
        num_shared: pages at its beginning that others held too.
        num_pages: those behind them.
        is_kept: whether what was in those is kept elsewhere.
    """

    num_computed: int
    num_shared: int
    num_pages: int
    is_kept: bool


@dataclass(slots=True, eq=False)
class Tenancy:
    """One sequence's.

    Attributes:
        num_computed: tokens whose KV is in ``pages`` while it runs; those behind them are still to be computed.
        pages: page ids in order; page ``i`` holds tokens ``[i * page_tokens, (i + 1) * page_tokens)``.
        reserve, slots: frames to come and transit slots of a sequence that does not fit the frames as a whole.
        state: the slot with the states of recurrent layers after ``num_computed`` tokens; ``None``: there are no such
            tokens or layers, or it is not known yet which one it will be.
        previous: tokens and slot of the state one token back, where a sequence steps back.
        capacity: tokens that the pages had room for when the last sweep was scheduled.
        suspension: what was computed, while the sequence waits for memory that was taken from it.
        sources: of its passages that are still to be moved, by their number, the pages that it holds them in.
        num_blended: tokens that were moved, the last of them before token *blended_to*.
        num_cached: tokens whose KV was there, or was another sequence's to compute, when it was admitted.
        num_loaded: those among them that came from the store.
        num_declined: tokens that the store had and that it was faster to compute.
    """

    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    reserve: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    state: int | None = None
    previous: tuple[int, int] | None = None
    capacity: int = 0
    suspension: Suspension | None = None
    sources: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    num_blended: int = 0
    blended_to: int = 0
    num_cached: int = 0
    num_loaded: int = 0
    num_declined: int = 0

    def rewind(self, num_tokens: int) -> None:
        """Tokens from *num_tokens* on are to be computed, whether they were or not."""
        self.num_computed = min(self.num_computed, num_tokens)
        self.num_cached = min(self.num_cached, num_tokens)
        if num_tokens < self.blended_to:
            self.num_blended = self.blended_to = 0

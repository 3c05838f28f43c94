"""A :class:`Sequence`: the tokens of one prompt and its answer, and how far their KV has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerstream.api.params import SamplingParams
from layerstream.core.constraint import Constraint


@dataclass(frozen=True, slots=True)
class Suspension:
    """What a sequence had computed when its memory was taken.

    Attributes:
        num_computed: tokens.
        kept: pages at its beginning that others held too.
        num_pages: those behind them, which were written under *number* (``None``: they were not).
    """

    num_computed: int
    kept: int
    num_pages: int
    number: int | None


@dataclass(slots=True, eq=False)
class Sequence:
    """One token sequence on its way through the sweeps.

    The scheduler reads it, the engine's commit step writes it, nobody else does.

    Attributes:
        sequence_id: unique within the engine; also the order of arrival.
        token_ids: prompt, then every accepted token.
        num_prompt_tokens: how many of them are the prompt.
        params: sampling parameters with the model's defaults filled in.
        num_computed: tokens whose KV is in ``pages``; ``token_ids[num_computed:]`` are still to be computed.
        pages: page ids in order; page ``i`` holds tokens ``[i * page_tokens, (i + 1) * page_tokens)``.
        reserve, slots: frames to come and transit slots of a sequence that does not fit the frames as a whole.
        prefix_keys: page keys of those pages of the prompt that other sequences may share.
        num_cached: tokens whose KV was there, or was another sequence's to compute, when this one was admitted.
        num_loaded: those among them that came from the store.
        num_declined: tokens that the store had and that it was faster to compute.
        constraint: the grammar that its output keeps to, if it has one.
        suspension: what it had computed, while it waits for memory that was taken from it.
        capacity: tokens that its pages have room for.
        fork_of: what beams of one search have in common; they are never guessed for, and never suspended.
        num_group_pages, num_group_rows: pages, and rows that are sampled in a sweep, that all beams of its search
            together may need.
        priority: who has more is admitted first.
        client: whom it is for; clients share the engine fairly.
        num_waited: sweeps that it has waited for its admission, before it was suspended too.
    """

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    reserve: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    prefix_keys: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    num_loaded: int = 0
    num_declined: int = 0
    constraint: Constraint | None = None
    suspension: Suspension | None = None
    capacity: int = 0
    fork_of: object = None
    num_group_pages: int = 0
    num_group_rows: int = 1
    priority: int = 0
    client: str = ""
    num_waited: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def max_num_tokens(self) -> int:
        """Tokens that prompt and the longest allowed answer have together."""
        return self.num_prompt_tokens + (self.params.max_tokens or 0)

    @property
    def num_pending(self) -> int:
        """Known tokens that are still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_long(self) -> bool:
        """Whether pages of its prompt stream."""
        return bool(self.slots)

    @property
    def is_prefilled(self) -> bool:
        """Whether the prompt is computed; what is still to be computed was generated."""
        return self.num_computed >= self.num_prompt_tokens

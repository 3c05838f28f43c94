"""A :class:`Sequence`: the tokens of one prompt and its answer, and what it has of the memory for KV.

Who writes what:

| field | who | when |
|---|---|---|
| ``token_ids``, ``constraint`` | whom it is computed for: an answer, a beam search, a drafter | a token is accepted |
| ``prefix_keys`` | who makes it; else ``Scheduler.add`` | once |
| ``tenancy`` | :mod:`layerstream.scheduling` alone | memory changes hands, a sweep is committed |
| all others | who makes it | once |
"""

from __future__ import annotations

from dataclasses import dataclass, field

from layerstream.api.params import SamplingParams
from layerstream.api.reading import HiddenState, Reading
from layerstream.core.constraint import Constraint
from layerstream.core.passages import Passage
from layerstream.core.tenancy import Tenancy


@dataclass(frozen=True, slots=True, eq=False)
class BeamGroup:
    """One beam search, as its beams have it in common: they run together, unsuspended and without guesses.

    Attributes:
        num_pages, num_rows: pages, and rows that are sampled in a sweep, that all beams together may need.
    """

    num_pages: int
    num_rows: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One token sequence on its way through the sweeps.

    Attributes:
        sequence_id: unique within the engine; also the order of arrival.
        token_ids: prompt, then every accepted token.
        num_prompt_tokens: how many of them are the prompt.
        params: sampling parameters with the model's defaults filled in.
        prefix_keys: page keys of those pages of the prompt that other sequences may share.
        constraint: the grammar that its output keeps to, if it has one.
        group: the beam search that it is a beam of.
        priority: who has more is admitted first.
        client: whom it is for; clients share the engine fairly.
        passages: parts of its prompt that may be had from elsewhere, in order and apart.
        owes: the sequences that compute those passages in contexts of their own; it is admitted after them.
        is_passage: whether it is one of those: nothing is sampled from it.
        tenant: whose memory it may share; empty: the engine's own.
        reading: what its prompt is read for; ``None``: it is answered.
        is_kept: whether a store may keep its pages.
        steps_back: whether its newest token is going to be computed more than once (``Scheduler.rewind``).
        tenancy: its memory for KV, and how much of that is filled.
    """

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    prefix_keys: list[bytes] = field(default_factory=list)
    constraint: Constraint | None = None
    group: BeamGroup | None = None
    priority: int = 0
    client: str = ""
    passages: tuple[Passage, ...] = ()
    owes: tuple[Sequence, ...] = ()
    is_passage: bool = False
    tenant: str = ""
    reading: Reading | None = None
    is_kept: bool = True
    steps_back: bool = False
    tenancy: Tenancy = field(default_factory=Tenancy)

    @property
    def needs_logits(self) -> bool:
        """Whether its last row goes through the head."""
        return not self.is_passage and not isinstance(self.reading, HiddenState)

    @property
    def reads_all_rows(self) -> bool:
        """Whether all rows of its prompt are wanted, so that none may be left out because its KV is there."""
        return isinstance(self.reading, HiddenState) and self.reading.pooling == "mean"

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
    def pages(self) -> list[int]:
        """Page ids in order, to be read: page ``i`` holds tokens ``[i * page_tokens, (i + 1) * page_tokens)``."""
        return self.tenancy.pages

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in the pages."""
        return self.tenancy.num_computed

    @property
    def num_blended(self) -> int:
        """Tokens of the prompt that were moved, by this sequence or by the one that it shares them with."""
        cached = self.tenancy.num_cached
        return self.tenancy.num_blended + sum(max(0, min(cached, part.stop) - part.start) for part in self.passages)

    @property
    def num_pending(self) -> int:
        """Known tokens that are still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_long(self) -> bool:
        """Whether pages of its prompt stream."""
        return bool(self.tenancy.slots)

    @property
    def is_prefilled(self) -> bool:
        """Whether the prompt is computed; what is still to be computed was generated."""
        return self.num_computed >= self.num_prompt_tokens

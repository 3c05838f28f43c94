"""Guesses from the checkpoint's own multi-token-prediction head (:mod:`layerstream.model.mtp`).

What comes after what: every sweep that counts leaves the final hidden states of its rows here (:meth:`MtpDrafter.saw`).
Before the next one is put together, the head computes the rows that can be computed of them: those of prompts, of the
newest tokens, of guesses that were right. From the newest of each sequence it guesses, token by token, each time with
its own hidden state in the place of the model's. So nothing of a sweep is kept past the next one but keys and values.

Guesses are verified like any others: the head can make a sweep bring more tokens, never other ones. Its keys and
values are not stored. After a restart, or behind a prefix that was not computed here, it knows what follows that prefix
alone, and guesses the worse for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Span, Sweep
from layerstream.model.runner import SweepRunner
from layerstream.scheduling.drafting.base import NOTHING, Guess, Guesses
from layerstream.scheduling.drafting.following import cut, find_computed, pack
from layerstream.scheduling.drafting.mirrors import Mirror, Mirrors
from layerstream.scheduling.drafting.pace import Pace
from layerstream.scheduling.packing import SweepLimits

NAME = "mtp"
MOST_GUESSES = 6  # one after the other
CHILDREN = 3  # per place; the surest one is gone on from
LEAST_SHARE = 0.05
LEAST_PROBABILITY = 0.1  # of what is gone on from
PRIOR = 0.8

_Given: TypeAlias = tuple[list[Span], dict[Sequence, torch.Tensor]]
"""Rows to be computed, and the hidden states that go with them: ``(rows, hidden)`` for each mirror."""


@dataclass(slots=True)
class _Chain:
    """Guesses for one sequence: tokens with their probabilities, place by place, the surest first; all but those at
    the last place follow the first one of the place before."""

    sequence: Sequence
    mirror: Mirror
    places: list[list[tuple[int, float]]] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    probability: float = 1.0

    @property
    def path(self) -> tuple[int, ...]:
        """The surest guesses so far."""
        return tuple(place[0][0] for place in self.places)

    def learn(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """``(vocabulary,)`` and ``(hidden,)`` of the newest row."""
        shares = torch.softmax(logits.float() / (self.sequence.params.temperature or 1.0), dim=-1)
        top = torch.topk(shares, min(CHILDREN, len(shares)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        place = [(token, share) for token, share in pairs if share >= LEAST_SHARE and self._may_come(token)]
        self.probability *= place[0][1] if place else 0.0
        self.hidden = hidden
        if place:
            self.places.append(place)

    def is_worth_more(self, least: float) -> bool:
        """Whether one guess more is probable enough, and may be used."""
        room = self.sequence.max_num_tokens - 1 - self.sequence.num_tokens
        return self.probability >= least and len(self.places) < room

    def _may_come(self, token: int) -> bool:
        constraint = self.sequence.constraint
        return constraint is None or constraint.admits((*self.path, token))


@dataclass(frozen=True, slots=True)
class _Place:
    chain: _Chain
    depth: int


class MtpDrafter:
    """Guesses as the head of the model has it.

    Args:
        runner: runs the head.
        mirrors: whom it follows.
        limits: of the head's sweeps.
    """

    name = NAME

    def __init__(self, runner: SweepRunner, mirrors: Mirrors, limits: SweepLimits) -> None:
        self._runner = runner
        self._mirrors = mirrors
        self._limits = limits
        self._pace = Pace()
        self._prepared = time.perf_counter()
        self._seen: tuple[Sweep, torch.Tensor] | None = None
        self._ended: set[Sequence] = set()
        self._chains: dict[Sequence, _Chain] = {}

    def saw(self, sweep: Sweep, hidden: torch.Tensor) -> None:
        """*sweep* counts; *hidden* ``(rows, hidden)`` is what its rows came to behind the final norm."""
        self._seen, self._ended = (sweep, hidden), set()
        self._pace.swept(time.perf_counter() - self._prepared)

    @torch.inference_mode()
    def prepare(self, sequences: Seq[Sequence]) -> None:
        """Follow what was computed, and guess for *sequences*."""
        spans, hidden = self._take_seen()
        self._chains = {}
        if self._pace.begins():
            followed = ((sequence, self._mirrors.of(sequence)) for sequence in sequences)
            self._chains = {sequence: _Chain(sequence, mirror) for sequence, mirror in followed if mirror is not None}
        started = time.perf_counter()
        is_round = all(len(span) <= self._limits.decode_rows for span in spans)  # prompts would be paid for anyway
        self._compute(spans, hidden)
        self._chains = {sequence: chain for sequence, chain in self._chains.items() if chain.places}
        num_guesses = 1
        while num_guesses < MOST_GUESSES and self._chains:
            spans, hidden = self._go_on()
            if not spans:
                break
            self._compute(spans, hidden)
            num_guesses += 1
        self._mirrors.take_back()
        self._prepared = time.perf_counter()
        if self._chains and is_round:
            self._pace.guessed(num_guesses, self._prepared - started)

    def begin(self, sequence: Sequence) -> _Place | None:
        """The first place of the chain that :meth:`prepare` made."""
        chain = self._chains.get(sequence)
        return None if chain is None else _Place(chain, 0)

    def expand(self, state: _Place | None) -> Guesses:
        """What was guessed there; only the surest has something behind it."""
        if state is None or state.depth >= len(state.chain.places):
            return NOTHING
        behind = _Place(state.chain, state.depth + 1)
        found = enumerate(state.chain.places[state.depth])
        guesses = tuple(Guess(token, share, None if at else behind) for at, (token, share) in found)
        return Guesses(guesses, str(state.depth + 1), PRIOR)

    def finish(self, sequence: Sequence) -> None:
        """Nothing is learned from it."""

    def forget(self, sequence: Sequence) -> None:
        """*sequence* is gone."""
        self._mirrors.forget(sequence)
        self._chains.pop(sequence, None)
        self._ended.add(sequence)

    def _take_seen(self) -> _Given:
        """The rows that the last sweep makes computable."""
        if self._seen is None:
            return [], {}
        (sweep, states), self._seen = self._seen, None
        computed = find_computed(sweep)
        if self._chains:
            self._pace.gained(sum(of.sources.count(NAME) for of in computed.values()), len(self._chains))
        spans, hidden = list[Span](), dict[Sequence, torch.Tensor]()
        for sequence, of in computed.items():
            if sequence in self._ended or not _is_worth(sequence):
                continue
            span = self._mirrors.follow(sequence, of.start, of.start + len(of.rows))
            if span is not None:
                spans.append(span)
                hidden[span.sequence] = states[of.rows[: len(span)]]
        return spans, hidden

    def _go_on(self) -> _Given:
        """One guess more for every chain that is worth it."""
        spans, hidden = list[Span](), dict[Sequence, torch.Tensor]()
        least = max(LEAST_PROBABILITY, self._pace.cost)
        for chain in self._chains.values():
            if not chain.is_worth_more(least):
                continue
            span = self._mirrors.guess(chain.mirror, chain.path[-1])
            if span is not None:
                assert chain.hidden is not None
                spans.append(span)
                hidden[span.sequence] = chain.hidden[None]
        return spans, hidden

    def _compute(self, spans: Seq[Span], hidden: Mapping[Sequence, torch.Tensor]) -> None:
        """Compute *spans*, of which *hidden* has the states, and let chains learn whose newest row is among them."""
        chains = {chain.mirror.rows: chain for chain in self._chains.values()}
        starts = {span.sequence: span.start for span in spans}
        for part in cut(spans, self._limits):
            newest = {span.sequence for span in part if span.stop == span.sequence.num_tokens}
            sampled = tuple(rows for rows in chains if rows in newest)
            sweep = Sweep(pack(part, self._limits), sampled)
            like = hidden[part[0].sequence]
            states = like.new_zeros((1, sweep.num_rows, like.shape[-1]))
            for row, span in sweep.spans():
                first = span.start - starts[span.sequence]
                states[0, row : row + len(span)] = hidden[span.sequence][first : first + len(span)]
            logits = self._runner.run(sweep, {"previous": states})
            own = self._runner.take_hidden()
            for at, (rows, row) in enumerate(zip(sampled, sweep.sampled_rows, strict=True)):
                chains[rows].learn(logits[at], own[row])


def _is_worth(sequence: Sequence) -> bool:
    """Whether anything is going to be guessed for *sequence*."""
    return sequence.group is None and sequence.max_num_tokens - sequence.num_tokens > 1

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
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from layerstream.core.draft import ROOT
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.model.runner import SweepRunner
from layerstream.scheduling.drafting.base import NOTHING, Guess, Guesses
from layerstream.scheduling.drafting.mirrors import Mirror, Mirrors
from layerstream.scheduling.drafting.pace import Pace
from layerstream.scheduling.packing import PromptBlocks, SweepLimits

NAME = "mtp"
MOST_GUESSES = 6  # one after the other
CHILDREN = 3  # per place; the surest one is gone on from
LEAST_SHARE = 0.05
LEAST_PROBABILITY = 0.1  # of what is gone on from
PRIOR = 0.8


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


@dataclass(frozen=True, slots=True)
class _Given:
    """Rows to be computed, each with the hidden state that goes with it: ``(rows, hidden)``."""

    span: Span
    hidden: torch.Tensor


@dataclass(slots=True)
class _Computed:
    """Rows of one sequence in a sweep, from that of token *start* on; of the head's guesses, how many were right."""

    start: int
    rows: list[int] = field(default_factory=list)
    num_right: int = 0


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
        given = self._take_seen()
        self._chains = {}
        if self._pace.begins():
            followed = ((sequence, self._mirrors.of(sequence)) for sequence in sequences)
            self._chains = {sequence: _Chain(sequence, mirror) for sequence, mirror in followed if mirror is not None}
        started = time.perf_counter()
        self._compute(given)
        self._chains = {sequence: chain for sequence, chain in self._chains.items() if chain.places}
        num_guesses = 1
        while num_guesses < MOST_GUESSES and (given := self._next()):
            self._compute(given)
            num_guesses += 1
        self._mirrors.take_back()
        self._prepared = time.perf_counter()
        if self._chains:
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

    def _take_seen(self) -> list[_Given]:
        """The rows that the last sweep makes computable."""
        if self._seen is None:
            return []
        (sweep, hidden), self._seen = self._seen, None
        computed = _computed(sweep)
        if self._chains:
            self._pace.gained(sum(of.num_right for of in computed.values()), len(self._chains))
        given = []
        for sequence, of in computed.items():
            if sequence in self._ended or not _is_worth(sequence):
                continue
            span = self._mirrors.follow(sequence, of.start, of.start + len(of.rows))
            if span is not None:
                given.append(_Given(span, hidden[of.rows[: len(span)]]))
        return given

    def _next(self) -> list[_Given]:
        """One guess more for every chain that is worth it."""
        given = []
        least = max(LEAST_PROBABILITY, self._pace.cost)
        for chain in self._chains.values():
            if not chain.is_worth_more(least):
                continue
            span = self._mirrors.guess(chain.mirror, chain.path[-1])
            if span is not None:
                assert chain.hidden is not None
                given.append(_Given(span, chain.hidden[None]))
        return given

    def _compute(self, given: Seq[_Given]) -> None:
        """Compute *given*, a sweep's worth at a time, and let chains learn whose newest row is among them."""
        chains = {chain.mirror.rows: chain for chain in self._chains.values()}
        for part in _sweeps(given, self._limits):
            blocks = _pack([item.span for item in part], self._limits)
            newest = {span.sequence for item in part if (span := item.span).stop == span.sequence.num_tokens}
            sampled = tuple(rows for rows in chains if rows in newest)
            sweep = Sweep(tuple(blocks), sampled)
            states = part[0].hidden.new_zeros((1, sweep.num_rows, part[0].hidden.shape[-1]))
            hidden_of = {item.span: item.hidden for item in part}
            for row, span in sweep.spans():
                states[0, row : row + len(span)] = hidden_of[span]
            logits = self._runner.run(sweep, {"previous": states})
            hidden = self._runner.take_hidden()
            for at, (rows, row) in enumerate(zip(sampled, sweep.sampled_rows, strict=True)):
                chains[rows].learn(logits[at], hidden[row])


def _is_worth(sequence: Sequence) -> bool:
    """Whether anything is going to be guessed for *sequence*."""
    return sequence.group is None and sequence.max_num_tokens - sequence.num_tokens > 1


def _computed(sweep: Sweep) -> dict[Sequence, _Computed]:
    """What *sweep* computed of each of its sequences, guesses that were right behind what was known."""
    found: dict[Sequence, _Computed] = {}
    nodes: dict[tuple[Sequence, int], int] = {}
    for row, span in sweep.spans():
        if span.node != ROOT:
            nodes[span.sequence, span.node] = row
        else:
            found.setdefault(span.sequence, _Computed(span.start)).rows.extend(range(row, row + len(span)))
    for sequence, tree in sweep.drafts.items():
        of = found[sequence]
        right = tree.along(sequence.token_ids[of.start + len(of.rows) : sequence.num_computed])
        of.rows.extend(nodes[sequence, node] for node in right)
        of.num_right = sum(tree.sources[node] == NAME for node in right)
    return found


def _sweeps(given: Seq[_Given], limits: SweepLimits) -> list[list[_Given]]:
    """*given* in sweeps within *limits*, in order; long ones are cut."""
    found: list[list[_Given]] = []
    left = sequences = 0
    for item in given:
        at = 0
        while at < len(item.span):
            if left <= 0 or not sequences:
                found.append([])
                left, sequences = limits.max_tokens, limits.max_sequences
            start = item.span.start + at
            count = min(len(item.span) - at, left, limits.chunk_tokens - start % limits.chunk_tokens)
            found[-1].append(_Given(Span(item.span.sequence, start, start + count), item.hidden[at : at + count]))
            taken = max(count, limits.decode_rows) if limits.one_sequence_per_block else count
            at, left, sequences = at + count, left - taken, sequences - 1
    return found


def _pack(spans: Seq[Span], limits: SweepLimits) -> list[RowBlock]:
    """Short spans side by side in blocks of decode rows, others as prompts are packed."""
    prompts = PromptBlocks(limits, limits.max_tokens, limits.max_tokens)
    short: list[list[Span]] = []
    for span in spans:
        if len(span) > limits.decode_rows:
            prompts.add(span)
        elif short and not limits.one_sequence_per_block and _rows(short[-1]) + len(span) <= limits.decode_rows:
            short[-1].append(span)
        else:
            short.append([span])
    return [*prompts.blocks(), *(RowBlock(tuple(group), limits.decode_rows) for group in short)]


def _rows(spans: Seq[Span]) -> int:
    return sum(map(len, spans))

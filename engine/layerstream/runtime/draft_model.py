"""Guesses from a small model of the same vocabulary, resident beside the one that streams.

It computes with the engine's own parts: a scheduler, pages and sweeps of its own, on the engine's thread, between two
sweeps of the large model. For each sequence a *mirror* with the same tokens runs there. A tree grows from a mirror's
newest token level by level: each sweep of the small model verifies nothing, it computes the rows of the tree so far and
gives distributions for the nodes that have none yet, the most probable ones first.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.runtime.step import SweepStep
from layerstream.runtime.steward import Steward
from layerstream.scheduling.drafting.base import NOTHING, Guess, Guesses

MOST_LEVELS = 16
ROWS_AT_ONCE = 48  # nodes that all trees together have while they grow
CHILDREN = 8  # per node
LEAST_SHARE = 0.01
LEAST_PROBABILITY = 0.02  # of a path whose end is worth a look
PRIOR = 0.95


@dataclass(slots=True)
class _Growing:
    """The tree of one mirror; ``children[path]`` are the tokens after it with their probabilities."""

    children: dict[tuple[int, ...], list[tuple[int, float]]] = field(default_factory=dict)
    probabilities: dict[tuple[int, ...], float] = field(default_factory=lambda: {(): 1.0})
    asked: tuple[tuple[int, ...], ...] = ()

    def unexplored(self) -> list[tuple[float, tuple[int, ...]]]:
        """Paths without children yet that are probable enough, with their probabilities."""
        return [
            (probability, path)
            for path, probability in self.probabilities.items()
            if path not in self.children and probability >= LEAST_PROBABILITY
        ]

    def ask(self, paths: Seq[tuple[int, ...]]) -> DraftTree:
        """The tree of *paths* and what they go through, depth first."""
        wanted = {path[: length + 1] for path in paths for length in range(len(path))}
        self.asked = tuple(sorted(wanted))
        numbers = {path: number for number, path in enumerate(self.asked)}
        parents = tuple(numbers.get(path[:-1], ROOT) for path in self.asked)
        return DraftTree(tuple(path[-1] for path in self.asked), parents, ("model",) * len(self.asked))

    def learn(self, logits: torch.Tensor, temperature: float) -> None:
        """``(1 + nodes, vocabulary)`` logits for the root and the nodes that were asked."""
        for row, path in enumerate(((), *self.asked)):
            if path in self.children:
                continue
            shares = torch.softmax(logits[row].float() / temperature, dim=-1)
            top = torch.topk(shares, min(CHILDREN, len(shares)))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            self.children[path] = [(token, share) for token, share in pairs if share >= LEAST_SHARE]
            for token, share in self.children[path]:
                self.probabilities[(*path, token)] = self.probabilities[path] * share


@dataclass(frozen=True, slots=True)
class _Place:
    growing: _Growing
    path: tuple[int, ...]


class ModelDrafter:
    """Guesses as a small model would go on.

    Args:
        steward, step: the small model's, all of it resident.
    """

    name = "model"

    def __init__(self, steward: Steward, step: SweepStep) -> None:
        self._steward = steward
        self._scheduler = steward.scheduler
        self._step = step
        self._mirrors: dict[Sequence, Sequence] = {}
        self._growing: dict[Sequence, _Growing] = {}
        self._asking: dict[Sequence, DraftTree] = {}

    def prepare(self, sequences: Seq[Sequence]) -> None:
        """Grow a tree for each of *sequences*."""
        self._growing = {mirror: _Growing() for sequence in sequences if (mirror := self._follow(sequence)) is not None}
        self._asking = {}
        while (sweep := self._schedule()) is not None:  # prompts, and what was accepted since
            self._run(sweep)
        for mirror in [mirror for mirror, growing in self._growing.items() if not growing.children]:
            del self._growing[mirror]  # it waits for memory
        for _ in range(MOST_LEVELS):
            if not self._ask():
                break
            sweep = self._schedule()
            assert sweep is not None, "mirrors with trees have their newest token before them"
            self._run(sweep)

    def begin(self, sequence: Sequence) -> _Place | None:
        """The root of the tree that :meth:`prepare` grew."""
        mirror = self._mirrors.get(sequence)
        growing = None if mirror is None else self._growing.get(mirror)
        return None if growing is None else _Place(growing, ())

    def expand(self, state: _Place) -> Guesses:
        """The children that were grown."""
        children = state.growing.children.get(state.path)
        if not children:
            return NOTHING
        guesses = tuple(Guess(t, share, _Place(state.growing, (*state.path, t))) for t, share in children)
        return Guesses(guesses, "any", PRIOR)

    def finish(self, sequence: Sequence) -> None:
        """Nothing is learned from it."""

    def forget(self, sequence: Sequence) -> None:
        """Drop the mirror of *sequence*."""
        mirror = self._mirrors.pop(sequence, None)
        if mirror is not None:
            self._growing.pop(mirror, None)
            self._steward.remove(mirror)

    def propose(self, sequences: Seq[Sequence], num_decoded: int, num_prompt_tokens: int) -> dict[Sequence, DraftTree]:
        """For the small model's own scheduler: the trees that are being grown."""
        return {mirror: tree for mirror, tree in self._asking.items() if len(tree) and mirror in set(sequences)}

    def _follow(self, sequence: Sequence) -> Sequence | None:
        """The mirror of *sequence* with its tokens, the newest still to be computed; ``None`` if it has no room."""
        mirror = self._mirrors.get(sequence)
        if mirror is None:
            if sequence.max_num_tokens > self._scheduler.max_tokens(sequence.num_prompt_tokens):
                return None
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            mirror = Sequence(
                sequence.sequence_id,
                prompt,
                len(prompt),
                sequence.params,
                tenant=sequence.tenant,
                steps_back=True,
            )
            self._mirrors[sequence] = mirror
            self._scheduler.add(mirror)
        mirror.token_ids.extend(sequence.token_ids[mirror.num_tokens :])
        self._scheduler.rewind(mirror, mirror.num_tokens - 1)
        return mirror

    def _ask(self) -> bool:
        """Choose the nodes of the next level; whether there are any."""
        candidates = sorted(
            (
                (probability, path, mirror)
                for mirror, g in self._growing.items()
                for probability, path in g.unexplored()
            ),
            key=lambda item: -item[0],
        )
        chosen: dict[Sequence, list[tuple[int, ...]]] = {}
        num_rows = 0
        for _, path, mirror in candidates:
            num_rows += len(path)
            if num_rows > ROWS_AT_ONCE and chosen:
                break
            if mirror.num_tokens + len(path) <= min(mirror.tenancy.capacity, mirror.max_num_tokens - 1):
                chosen.setdefault(mirror, []).append(path)
        self._asking = {mirror: self._growing[mirror].ask(paths) for mirror, paths in chosen.items()}
        for mirror in chosen:
            self._scheduler.rewind(mirror, mirror.num_tokens - 1)
        return bool(chosen)

    def _schedule(self) -> Sweep | None:
        return self._steward.schedule(self)

    def _run(self, sweep: Sweep) -> None:
        logits = self._step.run(sweep)
        if logits is None:
            return  # memory ran out; the next sweep carries less
        for mirror, rows in sweep.logit_rows():
            growing = self._growing.get(mirror)
            if growing is not None:
                growing.learn(logits[rows], mirror.params.temperature or 1.0)

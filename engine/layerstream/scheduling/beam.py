"""Beam search: which continuations of which beams are kept. Pure; the loop forks the sequences.

As transformers does it (``num_beams``, ``early_stopping=False``): of the ``(1 + ends)·width`` most probable
continuations of all beams, those that end are finished if they are among the first *width*, the best *width* others go
on. A finished answer's score is its log-probability divided by its length to the power of the length penalty. The
search is over when no beam that goes on can become better, at its length now, than the worst of *width* finished ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Continuation:
    """Beam *beam* goes on with *token_id*."""

    beam: int
    token_id: int
    score: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished answer: generated tokens, and its score."""

    token_ids: tuple[int, ...]
    score: float
    is_ended: bool


@dataclass(slots=True)
class BeamSearch:
    """The beams of one prompt; ``scores[i]`` is the log-probability of beam *i* so far."""

    width: int
    max_tokens: int
    length_penalty: float
    end_token_ids: Collection[int]
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[Hypothesis] = field(default_factory=list)

    def step(self, logprobs: Iterable[np.ndarray], outputs: Seq[Seq[int]]) -> list[Continuation]:
        """The beams after the next token, the best one first; none when the search is over.

        Args:
            logprobs: for each beam ``(vocabulary,)`` log-probabilities of the next token; one at a time is looked at.
            outputs: for each beam its generated tokens.
        """
        length = len(outputs[0]) + 1
        going: list[Continuation] = []
        for rank, found in enumerate(self._best(logprobs)):
            tokens = (*outputs[found.beam], found.token_id)
            if found.token_id in self.end_token_ids:
                if rank < self.width:
                    self._finish(tokens, found.score, is_ended=True)
            elif len(going) < self.width:
                going.append(found)
        if length >= self.max_tokens:
            for found in going:
                self._finish((*outputs[found.beam], found.token_id), found.score, is_ended=False)
            going = []
        elif len(self.finished) >= self.width and self.finished[-1].score >= self._normalised(going[0].score, length):
            going = []
        self.scores = [found.score for found in going]
        return going

    def best(self, count: int) -> list[Hypothesis]:
        """The *count* best finished answers."""
        return self.finished[:count]

    def _best(self, logprobs: Iterable[np.ndarray]) -> list[Continuation]:
        """The best continuations of all beams; of those that are equal the first beam's, and of its the lowest id."""
        count = (1 + max(1, len(self.end_token_ids))) * self.width
        found: list[Continuation] = []
        for beam, (score, row) in enumerate(zip(self.scores, logprobs, strict=True)):
            total = score + row
            found += [Continuation(beam, int(at), float(total[at])) for at in _largest(total, count)]
        return sorted(found, key=lambda continuation: -continuation.score)[:count]

    def _finish(self, tokens: tuple[int, ...], score: float, *, is_ended: bool) -> None:
        self.finished.append(Hypothesis(tokens, self._normalised(score, len(tokens)), is_ended))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]

    def _normalised(self, score: float, length: int) -> float:
        return score / length**self.length_penalty


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the *count* largest of *values* are, the largest first and equal ones in their order."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    at = np.flatnonzero(values >= least)  # with all that tie for the last place
    return at[np.argsort(-values[at], kind="stable")][:count]

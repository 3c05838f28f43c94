"""Beam search: which continuations of which beams are kept. Pure; the loop forks the sequences.

As transformers does it (``num_beams``, ``early_stopping=False``), in the same 32-bit floats, so that beams of equal
score come in the same order too: of the ``(1 + ends)·width`` most probable continuations of all beams, those that end
are finished if they are among the first *width*, the best *width* others go on. A finished answer's score is its
log-probability divided by its length to the power of the length penalty. The search is over when no beam that goes on
can become better, at its length now, than the worst of *width* finished ones, or when all continuations end.

There are *width* beams from the beginning: all of them the prompt, all but the first with next to no probability. Where
fewer than *width* continuations do not end, those that do go on for want of others, with next to none either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

UNLIKELY = np.float32(-1e9)  # transformers' own, and as a summand, because its rounding decides ties

MOST_TOGETHER = 2**18  # scores of all beams that are looked at together: choosing takes some 30 bytes for each

Top = Callable[[np.ndarray, int], np.ndarray]
"""The places of the largest values of a row, so many of them, the largest first."""


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
    """The beams of one prompt; ``scores[i]`` is the log-probability of beam *i* so far.

    Args:
        top: chooses; where values are equal, its order counts.
    """

    width: int
    max_tokens: int
    length_penalty: float
    end_token_ids: Collection[int]
    top: Top
    scores: np.ndarray = field(init=False)
    _finished: list[Hypothesis | None] = field(init=False)
    _finished_scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.full(self.width, UNLIKELY)
        self.scores[0] = 0.0
        self._finished = [None] * self.width
        self._finished_scores = np.full(self.width, UNLIKELY)

    def step(self, logprobs: Iterable[np.ndarray], outputs: Seq[Seq[int]]) -> list[Continuation]:
        """The beams after the next token, the best one first; none when the search is over.

        Args:
            logprobs: for each beam ``(vocabulary,)`` log-probabilities of the next token in 32 bits, taken one by one.
            outputs: for each beam its generated tokens.
        """
        length = len(outputs[0]) + 1
        found, scores = self._best(logprobs, max(2, 1 + len(self.end_token_ids)) * self.width)
        ends = np.array([token in self.end_token_ids for _, token in found])
        stops = ends | (length >= self.max_tokens)
        going = scores + stops * UNLIKELY
        chosen = self.top(going, self.width)
        self.scores = going[chosen]
        self._finish(
            [
                Hypothesis((*outputs[beam], token), 0.0, bool(end))
                for (beam, token), end in zip(found, ends, strict=True)
            ],
            scores / length**self.length_penalty,
            stops & (np.arange(len(found)) < self.width),
        )
        if stops.all() or not self._can_improve(length):
            return []
        return [Continuation(found[at][0], found[at][1], float(going[at])) for at in chosen]

    def best(self, count: int) -> list[Hypothesis]:
        """The *count* best finished answers."""
        return [hypothesis for hypothesis in self._finished if hypothesis is not None][:count]

    def _best(self, logprobs: Iterable[np.ndarray], count: int) -> tuple[list[tuple[int, int]], np.ndarray]:
        """``(beam, token)`` of the *count* best continuations of all beams, the best one first, and their scores.

        Where beams and vocabulary are large, only the best of each beam are kept, with all that tie for the last place:
        then it is ties alone that may come in another order.
        """
        places: list[tuple[int, np.ndarray]] = []
        kept: list[np.ndarray] = []
        for beam, row in enumerate(logprobs):
            total = row + self.scores[beam]
            if self.width * len(row) > MOST_TOGETHER and len(row) > count:
                at = np.flatnonzero(total >= np.partition(total, -count)[-count])
            else:
                at = np.arange(len(row))
            places.append((beam, at))
            kept.append(total[at])
        beams = np.concatenate([np.full(len(at), beam) for beam, at in places])
        tokens, scores = np.concatenate([at for _, at in places]), np.concatenate(kept)
        chosen = self.top(scores, min(len(scores), count))
        return [(int(beams[at]), int(tokens[at])) for at in chosen], scores[chosen]

    def _finish(self, hypotheses: list[Hypothesis], scores: np.ndarray, is_finished: np.ndarray) -> None:
        """Keep the best *width* of those finished before and of the *hypotheses* that are."""
        merged = np.concatenate([self._finished_scores, scores + ~is_finished * UNLIKELY])
        candidates = [*self._finished, *(h if done else None for h, done in zip(hypotheses, is_finished, strict=True))]
        chosen = self.top(merged, self.width)
        self._finished_scores = merged[chosen]
        kept = [(candidates[at], float(merged[at])) for at in chosen]
        self._finished = [h and Hypothesis(h.token_ids, score, h.is_ended) for h, score in kept]

    def _can_improve(self, length: int) -> bool:
        worst = self._finished_scores.min() if all(self._finished) else UNLIKELY
        return bool(self.scores[0] / np.float32(length**self.length_penalty) > worst)

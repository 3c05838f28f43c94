"""Guesses by repetition: what followed, earlier, the longest run of tokens that ends the sequence.

Texts to look in: the prompt with its retrieved context and the answer so far, and whatever else is given (answers that
were remembered). All places where the last token occurs are found by comparing arrays, and each is followed backwards
as far as it agrees. A suffix automaton finds the same places; built in Python it costs 15 ms for 4,096 tokens, before
a first guess is made, while a search of 4,096 tokens takes 0.1 ms and keeps nothing.

Several places go on differently: each continuation is a branch, weighed by how far its places agree, by how many they
are, and by what stands around them: a place right after words of the question is where its answer is likely to be. By
that alone (a run of length 0 ends everywhere) an answer's very first token can be guessed, while the prompt is still
being computed. A branch follows its places token by token, so its own agreement grows along it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from layerstream.core.sequence import Sequence
from layerstream.scheduling.drafting.base import NOTHING, Guess, Guesses
from layerstream.scheduling.drafting.relevance import START_TOKENS, UNRELATED, Starts, relate

LONGEST_MATCH = 24
MOST_PLACES = 96
QUESTION_TOKENS = 40  # the end of a prompt, where a question is
_KINDS = (
    (0, "0", 0.3),
    (1, "1", 0.3),
    (2, "2", 0.35),
    (3, "3", 0.5),
    (5, "4-5", 0.65),
    (8, "6-8", 0.75),
    (10**9, "9+", 0.9),
)
_END = -1  # between texts; no token
_WEIGHT_PER_TOKEN = 4.0
_WEIGHED_MATCH = 10
_ASKED_ALREADY = 0.3  # answers seldom begin with a word of the question


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the texts go on in the same way: what comes next is ``text[at]``."""

    text: np.ndarray
    at: np.ndarray
    weights: np.ndarray
    longest: int


class _Text:
    """The texts of one sequence in one array that grows with it; its prompt is the first that it is given."""

    def __init__(self, others: Seq[Seq[int]], prompt: Seq[int]) -> None:
        fixed = [token for other in others for token in (*other, _END)]
        self._start = LONGEST_MATCH + len(fixed)
        self._array = np.full(self._start + 2 * len(prompt) + 256, _END, dtype=np.int32)
        self._array[LONGEST_MATCH : self._start] = fixed
        self._num_own = 0
        self.follow(prompt)
        question = prompt[-QUESTION_TOKENS:]
        self._related = relate(self._array[: self._start + len(prompt)], len(question))
        self._asked = np.unique(question)

    def follow(self, token_ids: Seq[int]) -> None:
        """The sequence has *token_ids* by now: what it had, and more."""
        needed = self._start + len(token_ids) + 1
        if needed > len(self._array):
            self._array = np.concatenate([self._array, np.full(needed, _END, dtype=np.int32)])
        self._array[self._start + self._num_own : self._start + len(token_ids)] = token_ids[self._num_own :]
        self._num_own = len(token_ids)

    def search(self, *, own: bool, starts: Starts | None = None) -> _Places | None:
        """The places that agree with the end of the sequence, in its *own* text or not.

        Args:
            starts: given where an answer begins, so that any place may be meant.
        """
        stop = self._start + self._num_own
        text = self._array[: stop + 1]  # with an end behind it
        suffix = text[max(self._start, stop - LONGEST_MATCH) : stop]
        end = stop if own else self._start
        found = np.flatnonzero(text[LONGEST_MATCH : end - 1] == suffix[-1]) + LONGEST_MATCH
        found = found[text[found + 1] != _END]
        lengths = np.ones(len(found), dtype=np.int64)
        agreeing = np.arange(len(found))
        for length in range(2, len(suffix) + 1):
            agreeing = agreeing[text[found[agreeing] - length + 1] == suffix[-length]]
            if not len(agreeing):
                break
            lengths[agreeing] = length
        if starts is not None:
            anywhere = np.flatnonzero(text[LONGEST_MATCH:end] != _END) + LONGEST_MATCH - 1
            found = np.concatenate([found, anywhere])
            lengths = np.concatenate([lengths, np.zeros(len(anywhere), dtype=np.int64)])
        if not len(found):
            return None
        weights = _WEIGHT_PER_TOKEN ** np.minimum(lengths, _WEIGHED_MATCH) * self._fit(found + 1)
        if starts is not None:
            weights[np.isin(text[found + 1], self._asked)] *= _ASKED_ALREADY
            weights *= starts.weigh(text[found])
        best = np.argsort(-weights, kind="stable")[:MOST_PLACES]
        return _Places(text, found[best] + 1, weights[best], int(lengths[best].max()))

    def _fit(self, places: np.ndarray) -> np.ndarray:
        """Weights for what surrounds *places*: 1 at the most."""
        inside = places < len(self._related)
        return np.where(inside, self._related[np.where(inside, places, 0)], UNRELATED)


class SuffixDrafter:
    """Repeats what stands in the prompt and in the answer so far (if *own*), and in :meth:`others`."""

    def __init__(self, name: str = "context", *, own: bool = True) -> None:
        self.name = name
        self._own = own
        self._texts: dict[Sequence, _Text | None] = {}
        self._starts = Starts()
        self._first: dict[Sequence, _Places] = {}

    def prepare(self, sequences: Seq[Sequence]) -> None:
        """Nothing is to be prepared."""

    def others(self, sequence: Sequence) -> Seq[Seq[int]]:
        """Further texts for *sequence*, asked for once."""
        return ()

    def begin(self, sequence: Sequence) -> _Places | None:
        """The places that agree with the end of *sequence*."""
        if sequence not in self._texts:
            others = self.others(sequence)
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            self._texts[sequence] = _Text(others, prompt) if self._own or others else None
        text = self._texts[sequence]
        if text is None:
            return None
        text.follow(sequence.token_ids)
        if not sequence.num_output_tokens:
            places = text.search(own=self._own, starts=self._starts)
            if places is not None:
                self._first[sequence] = places
            return places
        self._learn_start(sequence)
        return text.search(own=self._own)

    def expand(self, state: _Places) -> Guesses:
        """How the places go on."""
        tokens = state.text[state.at]
        total = float(state.weights.sum())
        distinct, which = np.unique(tokens, return_inverse=True)
        guesses = []
        for number, token in enumerate(distinct.tolist()):
            if token == _END:
                continue
            own = which == number
            weights = state.weights[own]
            after = _Places(state.text, state.at[own] + 1, weights, state.longest + 1)
            guesses.append(Guess(token, float(weights.sum()) / total, after))
        if not guesses:
            return NOTHING
        _, kind, prior = next(item for item in _KINDS if state.longest <= item[0])
        return Guesses(tuple(guesses), kind, prior)

    def finish(self, sequence: Sequence) -> None:
        """Learn where its answer began."""
        self._learn_start(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Drop the texts of *sequence*."""
        self._texts.pop(sequence, None)
        self._first.pop(sequence, None)

    def _learn_start(self, sequence: Sequence) -> None:
        places = self._first.pop(sequence, None)
        if places is not None and sequence.num_output_tokens >= START_TOKENS:
            self._starts.learn(places.text, places.at, sequence.output_ids[:START_TOKENS])

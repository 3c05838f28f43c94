"""Where in a prompt its answer is likely to be taken from, before the answer has a first token.

Two signs: the place stands behind words of the question, and behind a token after which answers have begun before.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

WINDOW_TOKENS = 12  # before a place: the words that it is about
START_TOKENS = 2  # of an answer, by which the place is known that it was taken from
UNRELATED = 0.02
_SHARPNESS = 8.0
_START_TRIALS = 4.0
_START_RATE = 0.1


def relate(text: np.ndarray, num_asked: int) -> np.ndarray:
    """For each position of *text*, how much the window before it shares with the last *num_asked* tokens, in (0, 1].

    A shared token counts as much as it is rare, a shared pair of neighbours besides.
    """
    question = text[-num_asked:]
    tokens, which, counts = np.unique(text, return_inverse=True, return_counts=True)
    rarity = np.log(len(text) / counts)[which]
    shared = np.where(np.isin(text, question), rarity, 0.0)
    pairs = text.astype(np.int64)[:-1] * (int(tokens[-1]) + 2) + text[1:]
    is_asked = np.zeros(len(text), dtype=bool)
    is_asked[1:] = np.isin(pairs, pairs[-num_asked + 1 :] if num_asked > 1 else pairs[:0])
    shared = np.where(is_asked, 3 * shared, shared)
    shared[-num_asked:] = 0.0
    total = np.concatenate([[0.0], np.cumsum(shared)])
    stops = np.arange(len(text))
    related = total[stops] - total[np.maximum(0, stops - WINDOW_TOKENS)]
    return UNRELATED + (1 - UNRELATED) * (related / max(related.max(), 1e-9)) ** _SHARPNESS


class Starts:
    """After which tokens answers begin, as seen so far: a weight of 1 where nothing is known."""

    def __init__(self) -> None:
        self._counts: dict[int, list[float]] = {}

    def weigh(self, tokens: np.ndarray) -> np.ndarray:
        """A weight for a place behind each of *tokens*."""
        distinct, which = np.unique(tokens, return_inverse=True)
        rates = [self._rate(token) for token in distinct.tolist()]
        return np.array(rates)[which]

    def learn(self, text: np.ndarray, places: np.ndarray, answer: Seq[int]) -> None:
        """An answer that begins with *answer* was looked for at *places* of *text*."""
        ahead = np.stack([text[places + at] for at in range(len(answer))])
        is_right = (ahead == np.asarray(answer)[:, None]).all(axis=0)
        if not is_right.any():
            return
        before = text[places - 1]
        for token in np.unique(before).tolist():
            count = self._counts.setdefault(token, [0.0, 0.0])
            count[0] += bool(is_right[before == token].any())
            count[1] += 1

    def _rate(self, token: int) -> float:
        right, trials = self._counts.get(token, (0.0, 0.0))
        return (right + _START_TRIALS * _START_RATE) / (trials + _START_TRIALS) / _START_RATE

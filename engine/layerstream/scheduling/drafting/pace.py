"""Whether guesses that have to be computed pay: what they take against the sweeps that they save. Pure.

A sweep of *n* sequences brings *n* tokens in its seconds. Guessing ahead of it takes seconds as well and brings *g*
tokens more: it pays as long as ``g / n`` is more than ``guessing seconds / sweep seconds``, and so does each further
guess. All of them are measured, as means that fade. Where it does not pay it is tried again now and then.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_ROUNDS = 8  # that guess whatever comes of it
PROBE_EVERY = 16  # rounds, where guessing does not pay
MEMORY = 16.0  # rounds that are remembered: older ones fade


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    count: float = 0.0

    def add(self, value: float) -> None:
        self.count = min(MEMORY, self.count + 1)
        self.value += (value - self.value) / self.count


class Pace:
    """What rounds of guessing took and brought."""

    def __init__(self) -> None:
        self._sweep = _Mean()
        self._guess = _Mean()
        self._round = _Mean()
        self._gained = _Mean()
        self._num_rounds = 0
        self._num_skipped = 0

    def swept(self, seconds: float) -> None:
        """A sweep took *seconds*."""
        self._sweep.add(seconds)

    def guessed(self, num_guesses: int, seconds: float) -> None:
        """A round of *num_guesses*, one after the other, took *seconds*."""
        self._guess.add(seconds / num_guesses)
        self._round.add(seconds)
        self._num_rounds += 1

    def gained(self, num_tokens: int, num_sequences: int) -> None:
        """Of the guesses of a round for *num_sequences*, *num_tokens* were right."""
        self._gained.add(num_tokens / num_sequences)

    @property
    def cost(self) -> float:
        """Of one more guess, in tokens of a sweep for each sequence."""
        return self._guess.value / self._sweep.value if self._sweep.value else 0.0

    def begins(self) -> bool:
        """Whether to guess in the round that begins."""
        pays = self._gained.value * self._sweep.value > self._round.value
        if pays or self._num_rounds < FIRST_ROUNDS or self._num_skipped + 1 >= PROBE_EVERY:
            self._num_skipped = 0
            return True
        self._num_skipped += 1
        return False

"""How often guesses turned out right, by drafter and kind of place."""

from __future__ import annotations

from dataclasses import dataclass

PRIOR_TRIALS = 4.0  # what a prior weighs
MEMORY = 200.0  # trials that are remembered: older ones fade


@dataclass(slots=True)
class _Count:
    trials: float = 0.0
    right: float = 0.0


class Acceptance:
    """Rates in ``[0, 1]``, each a mean of prior and fading counts."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Count] = {}

    def rate(self, drafter: str, kind: str, prior: float) -> float:
        """How often one of *drafter*'s guesses at a place of *kind* is right."""
        count = self._counts.get((drafter, kind))
        if count is None:
            return prior
        return (count.right + PRIOR_TRIALS * prior) / (count.trials + PRIOR_TRIALS)

    def record(self, drafter: str, kind: str, is_right: bool) -> None:
        """At a place of *kind* the next token was, or was not, among *drafter*'s guesses."""
        count = self._counts.setdefault((drafter, kind), _Count())
        fading = 1 - 1 / MEMORY
        count.trials = count.trials * fading + 1
        count.right = count.right * fading + is_right

"""What a tier has of a prefix, asked for without waiting: a question is put once and asked again until it is answered.

The engine's thread alone asks. An answer comes with a claim on the pages that are not there; if nobody comes for it,
the claim is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerstream.store.connection import Question, TierConnection
from layerstream.store.segment import Key
from layerstream.store.tiers.base import PageFacts, Tier


@dataclass(frozen=True, slots=True)
class Found:
    """What a tier has of a prefix; ``None``: another process computes the next page. *claimed*: the rest, by us."""

    facts: list[PageFacts] | None
    claimed: Sequence[Key] = ()


class Lookup:
    """Asks the tier of *connection*."""

    def __init__(self, connection: TierConnection) -> None:
        self._connection = connection
        self._questions: dict[tuple[Key, int], Question[Found]] = {}

    @property
    def num_open(self) -> int:
        """Questions that nobody has the answer of yet."""
        return len(self._questions)

    def find(self, keys: Sequence[Key], start: int) -> list[PageFacts] | None:
        """The first of ``keys[start:]`` that are there, none while there is no tier; the others are claimed.

        Returns:
            ``None`` if another process is computing the next one, or there is no answer yet: ask again later.
        """
        wanted, name = keys[start:], (keys[-1], start)
        question = self._questions.get(name)
        if question is None:
            if self._connection.tier is None:
                return []
            question = self._questions[name] = Question(lambda tier: _find(tier, wanted), self._nobody_came(name))
        is_answered = self._connection.ask(question)
        if not is_answered and self._connection.tier is not None:
            return None
        self._questions.pop(name, None)
        return question.answer.facts if is_answered and question.answer is not None else []

    def forget(self) -> None:
        """There is no tier any more that would answer."""
        self._questions.clear()

    def _nobody_came(self, name: tuple[Key, int]) -> Callable[[Tier, Found], None]:
        def undo(tier: Tier, found: Found) -> None:
            self._questions.pop(name, None)
            tier.unclaim(found.claimed)

        return undo


def _find(tier: Tier, wanted: Sequence[Key]) -> Found:
    """What *tier* has of *wanted*; the rest is going to be computed here."""
    facts = tier.contains(wanted)
    if len(facts) == len(wanted):
        return Found(facts)
    missing = wanted[len(facts) :]
    if not tier.claim(missing):
        return Found(None)
    return Found(tier.contains(wanted), missing)  # it may have been finished in between

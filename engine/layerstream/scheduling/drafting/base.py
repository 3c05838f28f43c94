"""What a drafter is: a model of the next token, cheap enough to be asked for a tree of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from layerstream.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Guess:
    """One possible next token.

    Attributes:
        share: of the drafter's guesses at this place, how likely this one is; all together at most 1.
        state: where the drafter is after it.
    """

    token_id: int
    share: float
    state: Any


@dataclass(frozen=True, slots=True)
class Guesses:
    """What a drafter guesses at one place.

    Attributes:
        kind: places that a drafter is equally sure of, such as "four tokens match"; how often it is right there is
            measured (:mod:`layerstream.scheduling.drafting.acceptance`).
        prior: how often it is right there, as long as nothing was measured.
    """

    guesses: tuple[Guess, ...]
    kind: str
    prior: float


NOTHING = Guesses((), "nothing", 0.0)


class Drafter(Protocol):
    """Guesses next tokens. Stateless but for what it keeps per sequence until :meth:`forget`."""

    name: str

    def prepare(self, sequences: Seq[Sequence]) -> None:
        """A sweep is going to be put together; :meth:`begin` is going to be asked for each of *sequences*."""
        ...

    def begin(self, sequence: Sequence) -> Any:
        """The state after the newest token of *sequence*; ``None`` if there is nothing to guess from."""
        ...

    def expand(self, state: Any) -> Guesses:
        """What may come next."""
        ...

    def finish(self, sequence: Sequence) -> None:
        """*sequence* is a whole answer: something may be learned from it."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """*sequence* is gone."""
        ...

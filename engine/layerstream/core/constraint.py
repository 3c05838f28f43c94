"""What limits the tokens of a sequence: a grammar, as the noun that sampler and drafters see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Constraint(Protocol):
    """Where a sequence is in its grammar. Follows the sequence token by token."""

    @property
    def is_over(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        ...

    def mask(self) -> Any:
        """Which tokens may come next, ``(vocabulary,)`` bools of numpy.

        Raises:
            GrammarError: none may.
        """
        ...

    def accept(self, token_id: int) -> None:
        """The sequence went on with *token_id*.

        Raises:
            GrammarError: it may not.
        """
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is no choice."""
        ...

    def admits(self, token_ids: Sequence[int]) -> bool:
        """Whether the sequence may go on with *token_ids*."""
        ...

    def fork(self) -> Constraint:
        """A copy that goes its own way."""
        ...

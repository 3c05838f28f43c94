"""Drafting as the loop uses it: where it fails, there are no guesses any more, and everything else goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq

from layerstream.core.draft import DraftTree
from layerstream.core.sequence import Sequence
from layerstream.scheduling.drafting.trees import TreeDrafting

logger = logging.getLogger(__name__)


class Guesses:
    """*drafting*, until it fails.

    Args:
        judge: is told the error; raises if it ends the engine.
    """

    def __init__(self, drafting: TreeDrafting, judge: Callable[[BaseException], None]) -> None:
        self._drafting: TreeDrafting | None = drafting
        self._judge = judge

    def propose(self, sequences: Seq[Sequence], num_decoded: int, num_prompt_tokens: int) -> dict[Sequence, DraftTree]:
        """As :meth:`TreeDrafting.propose`."""
        return self._ask(lambda drafting: drafting.propose(sequences, num_decoded, num_prompt_tokens)) or {}

    def learn(self, sequence: Sequence, tree: DraftTree, right: Seq[int], drawn: Seq[int]) -> None:
        """As :meth:`TreeDrafting.learn`."""
        self._ask(lambda drafting: drafting.learn(sequence, tree, right, drawn))

    def finish(self, sequence: Sequence) -> None:
        """As :meth:`TreeDrafting.finish`."""
        self._ask(lambda drafting: drafting.finish(sequence))

    def forget(self, sequence: Sequence) -> None:
        """As :meth:`TreeDrafting.forget`."""
        self._ask(lambda drafting: drafting.forget(sequence))

    def _ask(self, question: Callable[[TreeDrafting], dict[Sequence, DraftTree] | None]):
        if self._drafting is None:
            return None
        try:
            return question(self._drafting)
        except BaseException as error:
            self._drafting = None
            logger.exception("guessing failed; from now on every token takes a sweep")
            self._judge(error)
            return None

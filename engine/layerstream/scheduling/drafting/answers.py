"""Guesses from what was answered before, after the same context: the store remembers it across processes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from layerstream.core.sequence import Sequence
from layerstream.scheduling.drafting.suffix import SuffixDrafter


class AnswerMemory(Protocol):
    """What outlives the process."""

    def recall(self, keys: Seq[bytes], num_prompt_tokens: int, tenant: str = "") -> list[list[int]]:
        """*tenant*'s earlier questions with their answers near the end of the prefix *keys*, the most recent first."""
        ...

    def remember(self, keys: Seq[bytes], prompt: Seq[int], answer: Seq[int], tenant: str = "") -> None:
        """*answer* was given to *prompt* of *tenant*, whose whole pages are *keys*."""
        ...


class AnswerDrafter(SuffixDrafter):
    """Repeats earlier answers: the same question's word for word, others' as far as they agree."""

    def __init__(self, memory: AnswerMemory) -> None:
        super().__init__("answers", own=False)
        self._memory = memory

    def others(self, sequence: Sequence) -> Seq[Seq[int]]:
        """What was asked and answered near the end of its prompt's prefix."""
        return self._memory.recall(sequence.prefix_keys, sequence.num_prompt_tokens, sequence.tenant)

    def finish(self, sequence: Sequence) -> None:
        """Remember what *sequence* has come to."""
        super().finish(sequence)
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        self._memory.remember(sequence.prefix_keys, prompt, sequence.output_ids, sequence.tenant)

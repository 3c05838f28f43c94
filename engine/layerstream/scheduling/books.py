"""Who waits, who runs, and who can do neither: the sequences that scheduling knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from layerstream.core.sequence import BeamGroup, Sequence
from layerstream.scheduling.queue import WaitingQueue


@dataclass(slots=True)
class Books:
    """The one account of them.

    Attributes:
        running: hold memory; in order of admission.
        failed: cannot go on, and why; they are still to be removed.
    """

    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    running: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)

    def clear(self) -> None:
        """Nobody is known."""
        self.waiting, self.running, self.failed = WaitingQueue(), [], []

    def admit(self, sequence: Sequence) -> None:
        """*sequence* has waited, and runs."""
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """*sequence* cannot go on because of *error*; the first reason counts."""
        if all(other is not sequence for other, _ in self.failed):
            self.failed.append((sequence, error))


def groups_of(sequences: Iterable[Sequence]) -> set[BeamGroup]:
    """The beam searches that *sequences* belong to."""
    return {sequence.group for sequence in sequences if sequence.group is not None}

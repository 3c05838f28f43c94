"""What waits to be written, and the frames that the writer is done with. No locks: the store has one around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from layerstream.kv.prefix import Published
from layerstream.store.answers import RememberedAnswer

MOST_ANSWERS = 1000  # that wait to be written; the oldest are dropped


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages that took *seconds* to compute; ``has_failed``: writing them was tried once."""

    published: Published
    seconds: float
    has_failed: bool = False


@dataclass(slots=True)
class WriteQueue:
    """Batches, parents first, and answers behind them."""

    batches: deque[Batch] = field(default_factory=deque)
    answers: deque[RememberedAnswer] = field(default_factory=lambda: deque(maxlen=MOST_ANSWERS))
    done: list[int] = field(default_factory=list)
    is_busy: bool = False
    is_closing: bool = False

    @property
    def has_work(self) -> bool:
        """Whether anything is not written yet."""
        return bool(self.batches or self.answers or self.is_busy)

    def take(self) -> Batch | RememberedAnswer:
        """What to write next."""
        self.is_busy = True
        return self.batches.popleft() if self.batches else self.answers.popleft()

    def withdraw(self, goes: Callable[[Published], bool]) -> list[Published]:
        """Those that *goes* says are not going to be written."""
        gone = [batch.published for batch in self.batches if goes(batch.published)]
        self.batches = deque(batch for batch in self.batches if not goes(batch.published))
        return gone

    def take_done(self) -> list[int]:
        """The frames that may be used again."""
        done, self.done = self.done, []
        return done

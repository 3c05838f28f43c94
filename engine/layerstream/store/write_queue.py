"""What waits to be written, and what the writer is done with. No locks: the writer has one around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from layerstream.kv.stored import Published, PublishedState
from layerstream.store.answers import RememberedAnswer

MOST_ANSWERS = 1000  # that wait to be written; the oldest are dropped


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages, or states after one, that took *seconds* to compute; ``has_failed``: writing them was tried once."""

    published: Published | PublishedState
    seconds: float
    has_failed: bool = False

    @property
    def is_spilled(self) -> bool:
        """Whether somebody waits for it to be stored."""
        return isinstance(self.published, Published) and self.published.is_spilled


@dataclass(slots=True)
class WriteQueue:
    """Batches, parents first, and answers behind them."""

    batches: deque[Batch] = field(default_factory=deque)
    answers: deque[RememberedAnswer] = field(default_factory=lambda: deque(maxlen=MOST_ANSWERS))
    done_frames: list[int] = field(default_factory=list)
    done_slots: list[int] = field(default_factory=list)
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

    def withdraw(self, goes: Callable[[Batch], bool]) -> list[Batch]:
        """Those that *goes* says are not going to be written."""
        gone = [batch for batch in self.batches if goes(batch)]
        self.batches = deque(batch for batch in self.batches if not goes(batch))
        return gone

    def finish(self, batch: Batch) -> None:
        """What *batch* was written from may be used again."""
        match batch.published:
            case Published(pages=pages):
                self.done_frames.extend(pages)
            case PublishedState(slot=slot):
                self.done_slots.append(slot)

    def take_frames(self) -> list[int]:
        """The frames that may be used again."""
        done, self.done_frames = self.done_frames, []
        return done

    def take_slots(self) -> list[int]:
        """The slots that may be used again."""
        done, self.done_slots = self.done_slots, []
        return done

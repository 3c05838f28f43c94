"""Whether blended prompts are answered as exact ones are: a share of them is asked again, exactly, while nobody waits.

| what | who | when |
|---|---|---|
| :class:`Guard` | the engine's thread writes, any thread reads | a shadow has ended |
| a :class:`Shadow` | the engine's thread | from the end of a blended answer until it is compared |

Invariants: a shadow is idle work (:mod:`layerstream.runtime.idle_work`): it is taken while nobody asks, and leaves when
somebody does; what it has by then is compared, or it is begun again later. No caller is told of one, and it counts for
no client. Its prompt has no passages, so it is exact and is stored as such. Where answers agree too rarely, prompts are
not blended any more, for good.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerstream.runtime.answer import Answer

logger = logging.getLogger(__name__)

THRESHOLD = 0.8
"""Of the answers that were compared, that agree: fewer, and blending ends."""
WINDOW = 32
LEAST = 8
"""Compared answers that a judgement takes; as many of the first blended ones are compared."""
ONE_IN = 20
"""Blended answers of which one is compared, after that."""
COMPARED_TOKENS = 8
"""Of an answer, from its beginning. What comes after the first different token says nothing more."""
MOST_WAITING = 8
MOST_TRIES = 3


@dataclass(eq=False)
class Shadow(Answer):
    """An exact answer beside the *compared* tokens of a *blended* one.

    Attributes:
        num_begun: how often that was begun, this time included.
    """

    compared: tuple[int, ...] = ()
    blended: Answer | None = None
    num_begun: int = 0


class Guard:
    """Counts answers that agree, and says whether prompts may be blended.

    Attributes:
        is_acting: whether it ends blending; where blending itself is measured, it does not, and compares nothing.
    """

    def __init__(self) -> None:
        self.is_acting = True
        self.is_blending = True
        self.num_compared = 0
        self.num_blended = 0
        self._agreed: deque[bool] = deque(maxlen=WINDOW)

    @property
    def agreement(self) -> float | None:
        """Share of the answers compared of late that agreed; ``None``: none was compared."""
        agreed = list(self._agreed)
        return sum(agreed) / len(agreed) if agreed else None

    def wants(self, num_waiting: int) -> bool:
        """Whether the blended answer that just ended is to be compared, beside *num_waiting* that are going to be."""
        self.num_blended += 1
        is_early = self.num_compared + num_waiting < LEAST
        return self.is_acting and self.is_blending and (is_early or self.num_blended % ONE_IN == 0)

    def record(self, *, agrees: bool) -> None:
        """A blended answer was compared with the exact one."""
        self.num_compared += 1
        self._agreed.append(agrees)
        agreement = self.agreement or 0.0
        if self.is_acting and self.is_blending and len(self._agreed) >= LEAST and agreement < THRESHOLD:
            self.is_blending = False
            logger.warning(
                "of the last %d blended answers that were asked again exactly, %.0f %% were the same: passages are not "
                "moved any more (reuse='anywhere'); raise recompute, or leave reuse at 'exact'",
                len(self._agreed),
                100 * agreement,
            )


class Shadows:
    """The blended answers that are still to be compared. The engine's thread alone.

    Args:
        make: a shadow of a blended answer.
    """

    def __init__(self, guard: Guard, make: Callable[[Answer], Shadow]) -> None:
        self._guard = guard
        self._make = make
        self._waiting: deque[tuple[Answer, int]] = deque(maxlen=MOST_WAITING)  # with how often each was begun

    def ended(self, answer: Answer) -> None:
        """*answer*, which somebody asked for, is over: remember it, if it is blended and to be compared."""
        if _is_comparable(answer) and self._guard.wants(len(self._waiting)):
            self._waiting.append((answer, 0))

    def gone(self, shadow: Shadow) -> None:
        """*shadow* is over, or made way: what it has of the answer is compared; one that has nothing is begun again,
        a few times."""
        found = tuple(shadow.sequence.output_ids[: len(shadow.compared)])
        if found:
            self._guard.record(agrees=found == shadow.compared[: len(found)])
        elif shadow.blended is not None and shadow.num_begun < MOST_TRIES:
            self._waiting.append((shadow.blended, shadow.num_begun))

    def begin(self, submit: Callable[[Sequence[Shadow]], bool]) -> bool:
        """Hand the next one to *submit*, which takes it if nobody asks; whether one waits for that still."""
        if not self._guard.is_blending:
            self._waiting.clear()
        if not self._waiting:
            return False
        blended, num_begun = self._waiting[0]
        shadow = self._make(blended)
        shadow.blended, shadow.num_begun = blended, num_begun + 1
        if submit([shadow]):
            self._waiting.popleft()
        return bool(self._waiting)


def _is_comparable(answer: Answer) -> bool:
    """Whether it is blended, and there is one right answer to it: the most probable tokens, free of a grammar."""
    sequence = answer.sequence
    is_free = sequence.params.is_greedy and sequence.constraint is None
    return sequence.num_blended > 0 and sequence.num_output_tokens > 0 and is_free

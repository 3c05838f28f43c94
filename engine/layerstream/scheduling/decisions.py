"""What is to be done about pages that leave memory and come back: values that the scheduler decides on.

Whoever runs the sweeps carries them out in their order, before a row is computed or a page copied: until then frames
hold what they held, whoever has them now. What could not be done, the scheduler is told (``Scheduler.lose_kept``). That
stored pages are to be read while a sweep goes on is a part of the sweep (:class:`~layerstream.core.sweep.PageLoad`).

For one sequence they come as ``Suspend``, then ``Resume`` or ``Forget``; and as ``Hold`` any number of times, then
``LetGo``. To forget, or to let go of, what is not there is no mistake.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerstream.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Suspend:
    """Keep what is in *pages*, and in the slot *state* if there are recurrent layers: *sequence* has computed it, and
    has lost them."""

    sequence: Sequence
    pages: tuple[int, ...]
    state: int | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """Put what was kept of *sequence*, from its page *first* on, into *pages*, and its states into the slot *state*;
    nothing is kept any longer."""

    sequence: Sequence
    first: int
    pages: tuple[int, ...]
    state: int | None = None


@dataclass(frozen=True, slots=True)
class Forget:
    """What was kept of *sequence* is not wanted."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Hold:
    """Stored pages *keys* stay: *sequence* is going to read them in every sweep."""

    sequence: Sequence
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class LetGo:
    """*sequence* reads no stored pages any more."""

    sequence: Sequence


Decision = Suspend | Resume | Forget | Hold | LetGo

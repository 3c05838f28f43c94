"""What a tier has of a prefix, asked for without waiting: a question is put once and asked again until it is answered.

The engine's thread alone asks. An answer comes with a claim on the pages that are not there; if nobody comes for it,
the claim is given up. A snapshot that another process has announced, as it is about to write it, is waited for:
the pages before it are there already, so whoever does not wait computes all of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerstream.kv.keys import snapshot_key
from layerstream.store.connection import Question, TierConnection
from layerstream.store.offers import Found, Snapshot, Wanted
from layerstream.store.segment import Key
from layerstream.store.tiers.base import Tier


@dataclass(frozen=True, slots=True)
class _Answer:
    """*found* is ``None`` if another process computes the next page; *claimed*: the rest, by us."""

    found: Found | None
    claimed: Sequence[Key] = ()


class Lookup:
    """Asks the tier of *connection*."""

    def __init__(self, connection: TierConnection) -> None:
        self._connection = connection
        self._questions: dict[tuple[Key, int, int | None], Question[_Answer]] = {}

    @property
    def num_open(self) -> int:
        """Questions that nobody has the answer of yet."""
        return len(self._questions)

    def find(self, wanted: Wanted) -> Found | None:
        """What is there of *wanted*, nothing while there is no tier; pages that are not there are claimed.

        Returns:
            ``None`` if another process is computing the next one, or there is no answer yet: ask again later.
        """
        name = wanted.keys[-1], wanted.start, wanted.resumable
        question = self._questions.get(name)
        if question is None:
            if self._connection.tier is None:
                return Found()
            question = self._questions[name] = Question(lambda tier: _find(tier, wanted), self._nobody_came(name))
        is_answered = self._connection.ask(question)
        if not is_answered and self._connection.tier is not None:
            return None
        self._questions.pop(name, None)
        return question.answer.found if is_answered and question.answer is not None else Found()

    def forget(self) -> None:
        """There is no tier any more that would answer."""
        self._questions.clear()

    def _nobody_came(self, name: tuple[Key, int, int | None]) -> Callable[[Tier, _Answer], None]:
        def undo(tier: Tier, answer: _Answer) -> None:
            self._questions.pop(name, None)
            tier.unclaim(answer.claimed)

        return undo


def count_resumable(tier: Tier, wanted: Wanted) -> int:
    """How many pages of *wanted* need not be computed, whatever that costs."""
    offer = wanted.offer(_find_unclaimed(tier, wanted))
    return 0 if offer is None else offer.num_computed


def _find(tier: Tier, wanted: Wanted) -> _Answer:
    """What *tier* has of *wanted*; the pages that it has not are going to be computed here."""
    found = _find_unclaimed(tier, wanted)
    if _is_being_written(tier, wanted, found):
        return _Answer(None)
    missing = wanted.keys[wanted.stop(found.pages) :]
    if not missing:
        return _Answer(found)
    if not tier.claim(missing):
        return _Answer(None)
    return _Answer(_find_unclaimed(tier, wanted), missing)  # it may have been finished in between


def _is_being_written(tier: Tier, wanted: Wanted, found: Found) -> bool:
    """Whether another process has states at hand beyond the last snapshot that is there, and will store them."""
    if wanted.resumable is None:
        return False
    last = found.snapshots[-1].boundary if found.snapshots else wanted.resumable
    return tier.is_announced({snapshot_key(key) for key in wanted.keys[last : wanted.stop(found.pages)]})


def _find_unclaimed(tier: Tier, wanted: Wanted) -> Found:
    pages = tier.contains(wanted.keys[wanted.first :]) if wanted.has_pages else []
    if wanted.resumable is None:
        return Found(pages)
    between = wanted.keys[wanted.resumable : wanted.stop(pages)]
    boundaries = {snapshot_key(key): wanted.resumable + count for count, key in enumerate(between, start=1)}
    snapshots = tier.any_of(list(boundaries)) if boundaries else []
    return Found(pages, [Snapshot(boundaries[facts.key], facts) for facts in snapshots])

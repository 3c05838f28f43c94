"""What a tier has of a prefix, asked for without waiting: a question is put once and asked again until it is answered.

The engine's thread alone asks. An answer comes with a claim on the pages that are not there; if nobody comes for it,
the claim is given up. A snapshot that another process has announced, as it is about to write it, is waited for:
the pages before it are there already, so whoever does not wait computes all of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerstream.kv.prefix import snapshot_key
from layerstream.store.connection import Question, TierConnection
from layerstream.store.segment import Key
from layerstream.store.tiers.base import PageFacts, Tier


@dataclass(frozen=True, slots=True)
class Offer:
    """*num_pages* and the snapshot after *boundary* pages (0: none) that can be loaded: *num_bytes*.

    They save computing *num_computed* pages, which took *seconds*.
    """

    num_pages: int
    num_computed: int
    boundary: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for: of ``keys``, the pages from *start* on. The others are in memory.

    Attributes:
        resumable: where there are recurrent layers: the number of pages whose states are in memory; snapshots after
            more of them are asked for as well, and what is known of the pages from there on.
        has_pages: False where pages have no bytes, and so are there without being stored.
    """

    keys: Sequence[Key]
    start: int
    resumable: int | None = None
    has_pages: bool = True

    @property
    def first(self) -> int:
        """The first page that facts are wanted of."""
        return self.start if self.resumable is None else min(self.start, self.resumable)

    def offer(self, found: Found) -> Offer | None:
        """What of *found* may be loaded, instead of being computed again."""
        if self.resumable is None:
            pages = found.pages
            return Offer(len(pages), len(pages), 0, *_sums(pages)) if pages else None
        stop = self.stop(found.pages)
        snapshots = [item for item in found.snapshots if item.boundary <= stop]
        if not snapshots:
            return None
        last = snapshots[-1]
        seconds = _sums(found.pages[self.resumable - self.first : last.boundary - self.first])[1]
        num_bytes = _sums(found.pages[self.start - self.first : last.boundary - self.first])[0] + last.facts.num_bytes
        if not self.has_pages:
            seconds = sum(item.facts.seconds for item in snapshots)
        num_pages = max(0, last.boundary - self.start)
        return Offer(num_pages, last.boundary - self.resumable, last.boundary, num_bytes, seconds)

    def stop(self, pages: Sequence[PageFacts]) -> int:
        """How many pages are at hand, or can be, where *pages* from :attr:`first` on are stored."""
        return max(self.start, self.first + len(pages)) if self.has_pages else len(self.keys)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """States that are stored: those after *boundary* pages."""

    boundary: int
    facts: PageFacts


@dataclass(frozen=True, slots=True)
class Found:
    """What a tier has: pages in a row, and snapshots after one of them or after one in memory, in order."""

    pages: Sequence[PageFacts] = ()
    snapshots: Sequence[Snapshot] = ()

    def without(self, is_lost: Callable[[Key], bool]) -> Found:
        """Less what was lost since, and pages that follow on one that was."""
        whole = next((at for at, facts in enumerate(self.pages) if is_lost(facts.key)), len(self.pages))
        return Found(self.pages[:whole], [item for item in self.snapshots if not is_lost(item.facts.key)])


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


def _sums(pages: Sequence[PageFacts]) -> tuple[int, float]:
    """Bytes of *pages*, and what computing them took."""
    return sum(facts.num_bytes for facts in pages), sum(facts.seconds for facts in pages)

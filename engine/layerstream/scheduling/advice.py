"""Which one change would let prompts reuse more, said once. Pure: tokens in, advice out.

A run of prompts may have most of its tokens in common and reuse few of them, because the question stands before the
passages, or the passages in another order each time. Both can be told from the prompts: of every prompt some hashes of
a few tokens in a row are kept, at places that the tokens themselves decide, so that a passage has the same ones
wherever it stands. What follows each other with the same history is a *block*; a block that is too long for a turn of
phrase, or for a question, is a passage (or the template). Then the prompts of the run are put together
again as they would be after a change, and what each has in common with the beginning of an earlier one is counted.

Invariants: no token is kept, only hashes, of the last :data:`PROMPTS` prompts of at most :data:`MOST_TENANTS` tenants;
advice is given once, and nothing is looked at after that; where nothing is to be said, it is looked for more and more
seldom.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Literal

import numpy as np

PROMPTS = 50
"""Prompts after which it is asked whether there is something to say."""

MOST_TENANTS = 16
MOST_TOKENS = 8192  # of a prompt
FEWEST_TOKENS = 256  # shorter prompts are not worth advice
PASSAGE_TOKENS = 48  # a shorter block is a turn of phrase
NEW_TOKENS = 96  # a shorter block that only one prompt has is a question, not a passage
LEAST_SEEN = 0.4  # of the tokens, in an earlier prompt
LEAST_GAIN = 0.1

_RUN_TOKENS = 8
_ONE_OF = 4
_SEAM_TOKENS = 14  # between two passages nothing else stands, though no hash tells exactly where they end
_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)

Change = Literal["context first", "order", "both"]
Block = tuple[int, ...]

WORDS: dict[Change, str] = {
    "context first": "put the context before the question (rag_prompt, context_first_prompts)",
    "order": "put documents into one order for all questions (StablePrefixOrder)",
    "both": "put the context before the question, and documents into one order (rag_prompt, StablePrefixOrder)",
}


@dataclass(frozen=True)
class Advice:
    """What to change.

    Attributes:
        seen: of the prompts' tokens, the share that stood in an earlier prompt.
        reused: the share whose KV was there.
        expected: the share that would have been, with *change*.
    """

    change: Change
    seen: float
    reused: float
    expected: float

    def __str__(self) -> str:
        return (
            f"of the last {PROMPTS} prompts {self.seen:.0%} of the tokens stood in earlier ones, and {self.reused:.0%} "
            f"were reused: {WORDS[self.change]}, and about {self.expected:.0%} would be"
        )


@dataclass(frozen=True, slots=True)
class Noted:
    """A prompt, as far as it is kept: hashes in order and where they stand, its tokens, and those that were reused."""

    marks: Block
    places: Block
    num_tokens: int
    num_reused: int


class Advisor:
    """Looks at prompts until there is something to say.

    Args:
        page_tokens: prefixes are shared in multiples of it.
    """

    def __init__(self, page_tokens: int) -> None:
        self.given: Advice | None = None
        self._page_tokens = page_tokens
        self._pause = 0
        self._num_unseen = 0
        self._runs: OrderedDict[str, list[Noted]] = OrderedDict()

    def note(self, prompt: Sequence[int], num_reused: int, tenant: str = "") -> Advice | None:
        """*prompt* was begun, *num_reused* of its tokens being there; what to say now."""
        if self.given is not None or len(prompt) < FEWEST_TOKENS:
            return None
        if self._num_unseen:
            self._num_unseen -= 1
            return None
        run = self._runs.setdefault(tenant, [])
        self._runs.move_to_end(tenant)
        run.append(Noted(*marks_of(prompt), len(prompt), num_reused))
        if len(self._runs) > MOST_TENANTS:
            self._runs.popitem(last=False)
        if len(run) < PROMPTS:
            return None
        del self._runs[tenant]
        self.given = advise(run, self._page_tokens)
        if self.given is not None:
            self._runs.clear()
        else:
            self._num_unseen = self._pause = max(PROMPTS, 2 * self._pause)
        return self.given


def marks_of(prompt: Sequence[int]) -> tuple[Block, Block]:
    """Hashes of some of the runs of a few tokens in *prompt*, in order: the same for the same tokens, wherever. And
    where they stand."""
    ids = np.asarray(prompt[:MOST_TOKENS], dtype=np.uint64)
    runs = np.zeros(max(0, len(ids) - _RUN_TOKENS + 1), dtype=np.uint64)
    for at in range(_RUN_TOKENS):
        runs = runs * _FACTOR + ids[at : at + len(runs)] + np.uint64(1)
    runs ^= runs >> np.uint64(29)
    runs *= _MIX
    runs ^= runs >> np.uint64(32)
    (places,) = np.nonzero(runs % np.uint64(_ONE_OF) == 0)
    return tuple(runs[places].tolist()), tuple(places.tolist())


def advise(run: Sequence[Noted], page_tokens: int) -> Advice | None:
    """What would help the prompts of *run* most, if it helps much."""
    total = sum(noted.num_tokens for noted in run)
    reused = sum(noted.num_reused for noted in run) / total
    cut = _Blocks(run)
    blocks = [cut.of(noted) for noted in run]
    known: set[int] = set()
    seen = 0.0
    for noted in run:
        seen += noted.num_tokens * sum(mark in known for mark in noted.marks) / max(1, len(noted.marks))
        known.update(noted.marks)
    if seen / total < max(LEAST_SEEN, reused + LEAST_GAIN):
        return None
    expected = {name: _shared(run, [change(prompt) for prompt in blocks], page_tokens) for name, change in _CHANGES}
    if _shared(run, blocks, page_tokens) > reused + LEAST_GAIN:  # something parts them that no hash tells
        expected["order"] = reused
    single: Change = max(("order", "context first"), key=lambda name: expected[name])  # type: ignore[assignment]
    best: Change = single if expected[single] >= expected["both"] - LEAST_GAIN else "both"
    if expected[best] < reused + LEAST_GAIN:
        return None
    return Advice(best, seen / total, reused, expected[best])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Marks that belong together; *place*: where it stood first, among all prompts; ``None``: no passage."""

    marks: Block
    place: tuple[int, int] | None


class _Blocks:
    """Cuts prompts where the history of their marks changes."""

    def __init__(self, run: Sequence[Noted]) -> None:
        self._counts = Counter(mark for noted in run for mark in dict.fromkeys(noted.marks))
        self._first: dict[int, tuple[int, int]] = {}
        for number, noted in enumerate(run):
            for position, mark in enumerate(noted.marks):
                self._first.setdefault(mark, (number, position))

    def of(self, noted: Noted) -> list[_Piece]:
        """*noted* in pieces, less what is only the seam of two passages."""
        pieces: list[_Piece] = []
        seam: list[_Piece] = []
        end = at = 0
        for (count, _), found in groupby(noted.marks, lambda mark: (self._counts[mark], self._first[mark][0])):
            block = tuple(found)
            least = 0 if at == 0 and count > 1 else PASSAGE_TOKENS if count > 1 else NEW_TOKENS
            if len(block) * _ONE_OF >= least:  # the template's beginning is one, however short
                if not pieces or noted.places[at] - end > _SEAM_TOKENS:
                    pieces += seam
                pieces.append(_Piece(block, self._first[block[0]]))
                end, seam = noted.places[at + len(block) - 1] + _RUN_TOKENS, []
            else:
                seam.append(_Piece(block, None))
            at += len(block)
        return [*pieces, *seam]


def _order(prompt: list[_Piece]) -> list[_Piece]:
    """Passages in the order in which they came first, behind what stands before them. What stands between them goes to
    the end."""
    head = 1 if prompt and prompt[0].place and prompt[0].place[1] == 0 else 0  # the template's beginning
    first = next((at for at in range(head, len(prompt)) if prompt[at].place), len(prompt))
    behind = _context_first(prompt[first:])
    count = sum(piece.place is not None for piece in behind)
    return [*prompt[:first], *sorted(behind[:count], key=lambda piece: piece.place or ()), *behind[count:]]


def _context_first(prompt: list[_Piece]) -> list[_Piece]:
    """Passages before everything else."""
    return sorted(prompt, key=lambda piece: piece.place is None)


_CHANGES: list[tuple[Change, Callable[[list[_Piece]], list[_Piece]]]] = [
    ("order", _order),
    ("context first", _context_first),
    ("both", lambda prompt: _order(_context_first(prompt))),
]


def _shared(run: Sequence[Noted], prompts: Sequence[list[_Piece]], page_tokens: int) -> float:
    """The share of tokens that stand at the beginning of an earlier one of *prompts*, in whole pages."""
    shared, total = 0, sum(noted.num_tokens for noted in run)
    beginnings: set[int] = set()
    for noted, pieces in zip(run, prompts, strict=True):
        own, beginning = [], 0
        for piece in pieces:
            for mark in piece.marks:
                beginning = hash((beginning, mark))
                own.append(beginning)
        most = sum(1 for _ in takewhile(beginnings.__contains__, own))
        tokens = int(noted.num_tokens * most / max(1, len(own)))
        shared += min(tokens, noted.num_tokens - 1) // page_tokens * page_tokens
        beginnings.update(own)
    return shared / total

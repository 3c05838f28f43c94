"""Which tokens of a blended prompt are moved, and which are computed. Pure.

A sequence that has passages (:mod:`layerstream.core.passages`) shares the pages of each, as they are entered under the
passage's own keys, from its admission until its prompt is computed. Whoever computes a passage in a context of its own
(``Sequence.owes``) was admitted before it, so the pages are ready, being loaded, or being computed in an earlier row of
the same sweep; and each layer keeps an earlier row's KV before it comes to a later one's.

Rules:

* a passage whose pages are not there any more is computed in its place, like the rest of the prompt: blending saves
  work, and is never waited for but in the sweep that brings it;
* of a passage some tokens are computed again: a share of it, or as many as ride free in the sweep. Either the first
  ones, which saw least of what now stands before them (EPIC, Hu et al., 2024); or those whose keys differ most from the
  moved ones in an early layer (CacheBlend, Yao et al., 2025): all of them have rows up to that layer then, and the
  others leave the sweep there;
* the prompt's last token is computed: it is sampled from;
* tokens advance without gaps: the moves between two computed spans go with the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from layerstream.core.passages import Move, Passage
from layerstream.core.sequence import Sequence
from layerstream.kv.pages import PagePool
from layerstream.kv.prefix import PrefixTable

FIRST_TOKENS = 16
"""Of every passage that are computed again at least."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """How much of what is moved is computed again.

    Attributes:
        share: of a passage's tokens; ``None``: what rides free.
        first: tokens of every passage, at least.
        by_deviation: those that differ most from what was moved, whichever they are; otherwise the first ones.
    """

    share: float | None = None
    first: int = FIRST_TOKENS
    by_deviation: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``[start, stop)`` that are computed, after *moves*."""

    start: int
    stop: int
    moves: tuple[Move, ...] = ()


class Blending:
    """Who holds whose pages, and what is moved out of them."""

    def __init__(self, pool: PagePool, prefixes: PrefixTable, recompute: Recompute) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._recompute = recompute

    def hold(self, sequence: Sequence, most: int, num_shared: int) -> int:
        """*sequence* is being admitted, with *num_shared* tokens that it need not compute: pages of its passages behind
        them stay until it has them, of those that are there, of *most* of them.

        Returns:
            Of how many.
        """
        there = {
            number: pages
            for number, passage in enumerate(sequence.passages)
            if passage.stop > num_shared and len(pages := self._prefixes.match(passage.keys)) == len(passage.keys)
        }
        for number in list(there)[:most]:
            self._pool.share(there[number])
            sequence.tenancy.sources[number] = there[number]
        return len(sequence.tenancy.sources)

    def release(self, sequence: Sequence) -> None:
        """*sequence* needs its passages' pages no longer."""
        sources, sequence.tenancy.sources = sequence.tenancy.sources, {}
        for pages in sources.values():
            self._pool.release(pages)

    def passages(self, sequence: Sequence) -> list[tuple[Passage, list[int]]]:
        """Those of *sequence* that are still to be moved and can be, each with its pages."""
        found: list[tuple[Passage, list[int]]] = []
        for number, pages in sequence.tenancy.sources.items():
            passage = sequence.passages[number]
            if passage.stop > sequence.num_computed and self._prefixes.pages_of(passage.keys) == pages:
                found.append((passage, pages))
        return found

    def is_ahead(self, sequence: Sequence, planned: Mapping[Sequence, int]) -> bool:
        """Whether a passage of *sequence* is neither computed nor *planned* for the sweep so far."""
        size = self._pool.page_tokens
        return any(
            planned.get(owner, owner.num_computed) < (position + 1) * size
            for passage, _ in self.passages(sequence)
            for position, owner in self._prefixes.owners(passage.keys)
        )

    def pieces(self, sequence: Sequence, chunk: int, free: int) -> Iterator[Piece]:
        """What of the prompt of *sequence* is still to be computed, no piece beyond the end of a *chunk*.

        Args:
            free: tokens that cost nothing.
        """
        start, stop = sequence.num_computed, sequence.num_prompt_tokens
        moves: list[Move] = []
        if self._recompute.by_deviation:
            yield from _cut(start, stop, chunk, ())
            return
        for move in self._moves(sequence, free):
            if move.start > start:
                yield from _cut(start, move.start, chunk, tuple(moves))
                moves = []
            moves.append(move)
            start = move.stop
        yield from _cut(start, stop, chunk, tuple(moves))

    def choice(self, sequence: Sequence, stop: int, free: int) -> tuple[tuple[Move, ...], int]:
        """Where rows are chosen by deviation: what of *sequence* up to token *stop* is moved, and how many of those
        tokens are computed to the end; *free* as above."""
        if not self._recompute.by_deviation:
            return (), 0
        found = [(passage, pages) for passage, pages in self.passages(sequence) if passage.start < stop]
        moves: list[Move] = []
        for passage, pages in found:
            first, last = (
                max(passage.start, sequence.num_computed),
                min(passage.stop, stop, sequence.num_prompt_tokens - 1),
            )
            if first < last:
                moves.append(Move(first, last, first - passage.distance, tuple(pages)))
        total = sum(map(len, moves))
        fresh = stop - sequence.num_computed - total
        share = (free - fresh) / max(1, total) if self._recompute.share is None else self._recompute.share
        least = min(total, self._recompute.first * len(moves))
        return tuple(moves), max(least, int(total * min(1.0, max(0.0, share))))

    def _moves(self, sequence: Sequence, free: int) -> Iterator[Move]:
        found = self.passages(sequence)
        total = sum(len(passage) for passage, _ in found)
        fresh = sequence.num_prompt_tokens - sequence.num_computed - total
        for passage, pages in found:
            again = self._num_again(passage, (free - fresh) / total if total else 0.0)
            first = max(passage.start + again, sequence.num_computed)
            last = min(passage.stop, sequence.num_prompt_tokens - 1)
            if first < last:
                yield Move(first, last, first - passage.distance, tuple(pages))

    def _num_again(self, passage: Passage, free_share: float) -> int:
        share = free_share if self._recompute.share is None else self._recompute.share
        return max(self._recompute.first, int(len(passage) * min(1.0, max(0.0, share))))


def _cut(start: int, stop: int, chunk: int, moves: tuple[Move, ...]) -> Iterator[Piece]:
    """``[start, stop)`` in pieces that end with chunks, the first one after *moves*."""
    while start < stop:
        end = min(start // chunk * chunk + chunk, stop)
        yield Piece(start, end, moves)
        start, moves = end, ()

"""Whom a multi-token-prediction head follows, how far, and in which pages. Pure: no tensors.

A *mirror* is a sequence as its head sees it: row *j* is token *first + j + 1* of the sequence, beside the model's
hidden state of token *first + j*. It begins where hidden states were first seen. What came from the store, or was
another sequence's, had none: a mirror begins behind it, and its positions count from there (rotary embeddings know
distances only).

| who | holds a page |
|---|---|
| a mirror | since its rows needed it, until it is dropped: with its sequence, or to begin anew |

Invariant: rows before ``kept`` have their keys and values in the pages; those behind it are guesses, or are still to
come, and are written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Span
from layerstream.kv.pages import PagePool


@dataclass(slots=True, eq=False)
class Mirror:
    """One sequence's.

    Attributes:
        first: token of the sequence whose hidden state row 0 is beside.
        rows: the tokens of its rows, and its pages.
    """

    first: int
    rows: Sequence

    @property
    def kept(self) -> int:
        """Rows whose keys and values are in its pages."""
        return self.rows.num_computed

    @property
    def reached(self) -> int:
        """Tokens of the sequence that have a row, or that the first row is behind."""
        return self.first + self.kept


class Mirrors:
    """The mirrors of an engine, with pages of *pool*."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._mirrors: dict[Sequence, Mirror] = {}

    def __iter__(self) -> Iterator[Mirror]:
        return iter(self._mirrors.values())

    def of(self, sequence: Sequence) -> Mirror | None:
        """That of *sequence*, if its rows reach to its newest token: it can be drafted for."""
        mirror = self._mirrors.get(sequence)
        return mirror if mirror is not None and mirror.reached == sequence.num_tokens - 1 else None

    def follow(self, sequence: Sequence, start: int, stop: int) -> Span | None:
        """Hidden states of tokens ``[start, stop)`` of *sequence* are at hand: the rows that are to be computed of
        them. Row *j* of the span goes with that of token ``first + j``.

        Returns:
            ``None``: there is nothing to compute, or no page for it; then the mirror is dropped.
        """
        stop = min(stop, sequence.num_tokens - 1)  # the token that follows is needed
        if start >= stop:
            return None
        mirror = self._mirrors.get(sequence)
        if mirror is None or not mirror.first <= start <= mirror.reached:
            self.forget(sequence)
            mirror = self._mirrors[sequence] = Mirror(start, Sequence(sequence.sequence_id, [], 0, SamplingParams()))
        rows, at = mirror.rows, start - mirror.first
        del rows.token_ids[at:]
        rows.token_ids += sequence.token_ids[start + 1 : stop + 1]
        if not self._has_room(rows):
            self.forget(sequence)
            return None
        rows.tenancy.num_computed = rows.num_tokens
        return Span(rows, at, rows.num_tokens)

    def guess(self, mirror: Mirror, token_id: int) -> Span | None:
        """One row more, for a guess that *token_id* comes next; ``None``: there is no page for it."""
        mirror.rows.token_ids.append(token_id)
        if not self._has_room(mirror.rows):
            return None
        return Span(mirror.rows, mirror.rows.num_tokens - 1, mirror.rows.num_tokens)

    def take_back(self) -> None:
        """Rows of guesses are none any more."""
        for mirror in self:
            del mirror.rows.token_ids[mirror.kept :]

    def forget(self, sequence: Sequence) -> None:
        """Drop the mirror of *sequence*."""
        mirror = self._mirrors.pop(sequence, None)
        if mirror is not None:
            self._pool.release(mirror.rows.pages)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless the mirrors account for all pages."""
        self._pool.check_integrity([mirror.rows.pages for mirror in self])

    def _has_room(self, rows: Sequence) -> bool:
        """Whether there are pages for all *rows*; those that are missing are acquired."""
        missing = self._pool.pages_for(rows.num_tokens) - len(rows.pages)
        if missing <= 0:
            return True
        found = self._pool.acquire(missing, after=rows.pages[-1] if rows.pages else None)
        if found is None:
            return False
        rows.tenancy.pages = [*rows.pages, *found]
        return True

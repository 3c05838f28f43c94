"""A :class:`Passage`: a part of a prompt whose KV may be had from where it was computed before, in another place.

What a token's KV is depends on all tokens before it, so only what stands at the beginning of a prompt is there exactly.
A passage is computed once in a *context of its own*: the prompt's head (its first tokens, the same for all), then the
passage. That is an ordinary prefix, in ordinary pages under ordinary keys. Where the passage stands elsewhere, its rows
are moved: their keys are rotated to the new positions, and some of them are computed again, because they should have
seen what now stands before them. A prompt that holds moved rows is *blended*: nearly, not exactly, what it would be.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_TOKENS = 32
"""Of a prompt, before a passage in a context of its own, at most: what all prompts of a kind begin with, and no more.
Attention leans on the first tokens of a text, whatever they are (Xiao et al., 2023: attention sinks)."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens ``[start, stop)`` of a prompt, which are tokens ``[source, source + stop - start)`` of a context of their
    own.

    Attributes:
        keys: of the pages of that context that hold them, from its beginning.
        how: which of its tokens are computed again; pages that were blended otherwise are others.
    """

    start: int
    stop: int
    source: int
    keys: tuple[bytes, ...]
    how: str = ""

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def distance(self) -> int:
        """Positions that its rows are moved by."""
        return self.start - self.source


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens ``[start, stop)`` of a sequence come out of *pages*, where they are from token *source* on."""

    start: int
    stop: int
    source: int
    pages: tuple[int, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def distance(self) -> int:
        """Positions that keys are moved by."""
        return self.start - self.source

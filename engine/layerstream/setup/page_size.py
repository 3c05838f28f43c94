"""How many tokens a page has: as few as pay. Pure.

Prompts share whole pages, so small ones share more: what two prompts have in common ends half a page too early on
average. But a page-layer is padded to 4 KiB on disk, and where a token has few bytes of KV, small pages are mostly
padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerstream.kv.shape import PageShape
from layerstream.planner import facts as assumed
from layerstream.store.codecs import CODECS
from layerstream.store.segment import padded

MOST_PADDING = 0.5  # of what is kept: pages of 32 lose 16 tokens of what two prompts share, those of 8 four


def choose_page_tokens(shapes: Sequence[PageShape], compression: str, chunk_tokens: int) -> int:
    """Of :data:`~layerstream.planner.facts.PAGE_CHOICES`, as far as *chunk_tokens* are whole pages: the smallest that
    is hardly padded where layers keep *shapes*, or else the one that is padded least."""
    codec = CODECS[compression]
    choices = [size for size in assumed.PAGE_CHOICES if chunk_tokens % size == 0] or [chunk_tokens]

    def padding(page_tokens: int) -> float:
        sizes = [codec.num_bytes(shape, page_tokens) for shape in shapes]
        return sum(map(padded, sizes)) / sum(sizes) - 1 if sizes else 0.0

    fine = [size for size in choices if padding(size) <= MOST_PADDING]
    return fine[0] if fine else min(choices, key=padding)

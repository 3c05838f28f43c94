"""What is written of a model's memory: pages of its layers, and snapshots of its recurrent layers.

A *snapshot*, the states of all recurrent layers after a page, is a page of one token in bytes, whatever the codec of
pages is: a state is read at every token that follows, so it comes back bit for bit. It continues its page; of a model
whose layers are all recurrent, pages have no bytes and are not stored, and it continues nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerstream.kv.prefix import PublishedState, snapshot_key
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.shape import PageShape
from layerstream.kv.state import LayerState
from layerstream.store.codecs import CODECS, PageCodec
from layerstream.store.segment import SNAPSHOT_TOKENS, Key, padded
from layerstream.store.tiers.base import NewPages

SNAPSHOT_CODEC = CODECS["none"]


class Contents:
    """The layers that keep pages (*states*), encoded by *codec*, and the *recurrent* ones."""

    def __init__(
        self, states: Sequence[LayerState], page_tokens: int, codec: PageCodec, recurrent: Sequence[RecurrentLayer]
    ) -> None:
        self.states = states
        self.recurrent = recurrent
        self.page_tokens = page_tokens
        self._codec = codec

    def page_bytes(self, kv_token_bytes: int) -> int:
        """Bytes of a page on disk; before anything was computed, what it takes without compression."""
        shapes = [state.shape for state in self.states]
        if any(shape is None for shape in shapes):
            return self.page_tokens * kv_token_bytes
        return sum(self._page_layer_bytes(shape) for shape in shapes if shape is not None)

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a snapshot on disk."""
        return sum(padded(SNAPSHOT_CODEC.num_bytes(layer.shape, SNAPSHOT_TOKENS)) for layer in self.recurrent)

    def parent_of(self, item: PublishedState) -> Key:
        """What a snapshot continues."""
        return item.key if self.states else b""

    def pages(self, keys: Sequence[Key], parent: Key, pages: Sequence[int], seconds: float, pinned: bool) -> NewPages:
        """*keys*, which are in the frames *pages*."""
        shapes: list[PageShape] = []
        for state in self.states:
            assert state.shape is not None, "published pages were written"
            shapes.append(state.shape)
        return NewPages(
            keys=tuple(keys),
            parent=parent,
            page_tokens=self.page_tokens,
            codec=self._codec.name,
            shapes=tuple(shapes),
            encode_layer=lambda layer: [self._codec.encode(*self.states[layer].page(page)) for page in pages],
            num_bytes=sum(map(self._page_layer_bytes, shapes)) * len(pages),
            seconds=seconds,
            pinned=pinned,
        )

    def snapshot(self, item: PublishedState, seconds: float, pinned: bool) -> NewPages:
        """The states of *item*."""
        return NewPages(
            keys=(snapshot_key(item.key),),
            parent=self.parent_of(item),
            page_tokens=SNAPSHOT_TOKENS,
            codec=SNAPSHOT_CODEC.name,
            shapes=tuple(layer.shape for layer in self.recurrent),
            encode_layer=lambda layer: [SNAPSHOT_CODEC.encode(*self.recurrent[layer].read(item.slot))],
            num_bytes=self.snapshot_bytes,
            seconds=seconds,
            pinned=pinned,
        )

    def _page_layer_bytes(self, shape: PageShape) -> int:
        return padded(self._codec.num_bytes(shape, self.page_tokens))

"""What pages are written from: layers in memory that keep them.

The states of recurrent layers after a page, a *snapshot*, are a page of one token in bytes, and slots are its frames.
It is written as it is, whatever the codec of pages: a state is read at every token that follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerstream.kv.keys import snapshot_key
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.shape import PageShape
from layerstream.kv.stored import Published, PublishedState
from layerstream.kv.swap import Swapped
from layerstream.store.codecs import CODECS, PageCodec
from layerstream.store.segment import SNAPSHOT_TOKENS, padded
from layerstream.store.tiers.base import NewPages


class PageSource:
    """Pages of *page_tokens* tokens of all *layers*; without layers they have no bytes, and there is nothing to write.

    What is read of a layer is not changed while it is (:class:`~layerstream.kv.stored.Published`).
    """

    def __init__(self, layers: Sequence[Swapped], page_tokens: int, codec: PageCodec) -> None:
        self.page_tokens = page_tokens
        self._layers = layers
        self._codec = codec

    @property
    def has_bytes(self) -> bool:
        """Whether there is anything to write of a page."""
        return bool(self._layers)

    @property
    def page_bytes(self) -> int | None:
        """Of a page on disk; ``None``: a layer's shape is not known yet."""
        shapes = [layer.shape for layer in self._layers]
        return None if None in shapes else sum(self._layer_bytes(shape) for shape in shapes if shape is not None)

    def assumed_bytes(self, token_bytes: int) -> int:
        """Of a page without compression, whose layers take *token_bytes* for a token, as much as each other."""
        count = max(1, len(self._layers))
        return count * padded(-(-self.page_tokens * token_bytes // count))

    def encode(self, run: Published, seconds: float, *, pinned: bool) -> NewPages:
        """The pages of *run*, encoded layer by layer when they are written; computing them took *seconds*."""
        shapes = tuple(layer.shape for layer in self._layers if layer.shape is not None)
        assert len(shapes) == len(self._layers), "published pages were written"
        return NewPages(
            keys=run.keys,
            parent=run.parent,
            page_tokens=self.page_tokens,
            codec=self._codec.name,
            shapes=shapes,
            encode_layer=lambda layer: [self._codec.encode(*self._layers[layer].page(page)) for page in run.pages],
            num_bytes=sum(map(self._layer_bytes, shapes)) * len(run.pages),
            seconds=seconds,
            pinned=pinned,
        )

    def _layer_bytes(self, shape: PageShape) -> int:
        return padded(self._codec.num_bytes(shape, self.page_tokens))


def snapshot_source(recurrent: Sequence[RecurrentLayer]) -> PageSource:
    """What snapshots of *recurrent* are written from."""
    return PageSource(recurrent, SNAPSHOT_TOKENS, CODECS["none"])


def snapshot_run(item: PublishedState, *, has_page: bool) -> Published:
    """*item* as a page. It continues the page that it follows, or nothing where pages have no bytes."""
    return Published((snapshot_key(item.key),), item.key if has_page else b"", (item.slot,))

"""A small hybrid model's layers with known contents, and stores over them, for tests that need no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from layerstream.core.sweep import PageLoad
from layerstream.hardware.reader import DirectReader
from layerstream.kv.keys import snapshot_key
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.shape import StatePart, StateShape
from layerstream.kv.state import LayerState, PageMemory
from layerstream.kv.stored import Published, PublishedState
from layerstream.store.choice import Rates
from layerstream.store.codecs import CODECS
from layerstream.store.loader import PageLoader
from layerstream.store.segment import SNAPSHOT_TOKENS, padded
from layerstream.store.store import PrefixStore
from layerstream.store.tiers.base import NewPages
from layerstream.store.tiers.folder import Bounds, StoreFolder
from layerstream.store.tiers.local import LocalTier

from tests.store.pages import PAGE_TOKENS, ROOMY, SHAPES, contents

RATES = Rates(1e9, 1.0, 96)
NUM_PAGES = 16
NUM_SLOTS = 8
STATES = (
    StateShape((StatePart("conv", (6, 3), "bfloat16"), StatePart("recurrent", (2, 8, 4), "float32"))),
    StateShape((StatePart("recurrent", (1030,), "float32"),)),
)
"""Two recurrent layers; the second is longer than what a disk reads at once."""


class Memory:
    """Pages and slots of a model; ``num_layers`` of *SHAPES* keep pages."""

    def __init__(self, num_layers: int = len(SHAPES), shapes: Sequence[StateShape] = STATES) -> None:
        self.layers = [LayerState(NUM_PAGES, PAGE_TOKENS, PageMemory(2**16), layer) for layer in range(num_layers)]
        self.recurrent = [RecurrentLayer(shape, NUM_SLOTS) for shape in shapes]

    def compute_page(self, key: bytes, page: int) -> None:
        """Have *page* hold what page *key* does."""
        for number, layer in enumerate(self.layers):
            layer.reserve(SHAPES[number])
            for found, computed in zip(layer.page(page), contents(key, number), strict=True):
                found.copy_(computed)

    def compute_state(self, key: bytes, slot: int) -> None:
        """Have *slot* hold the states after page *key*."""
        for number, layer in enumerate(self.recurrent):
            layer.page(slot)[0].copy_(state_after(key, number, layer.shape.key_width))

    def has_page(self, key: bytes, page: int) -> bool:
        """Whether *page* holds what page *key* does."""
        return all(
            torch.equal(found, computed)
            for number, layer in enumerate(self.layers)
            for found, computed in zip(layer.page(page), contents(key, number), strict=True)
        )

    def has_state(self, key: bytes, slot: int) -> bool:
        """Whether *slot* holds the states after page *key*."""
        found = [layer.page(slot)[0] for layer in self.recurrent]
        return all(torch.equal(f, state_after(key, number, f.shape[-1])) for number, f in enumerate(found))


def state_after(key: bytes, layer: int, num_bytes: int) -> torch.Tensor:
    """The bytes of *layer*'s state after page *key*: random, the same every time."""
    generator = torch.Generator().manual_seed(int.from_bytes(key[6:12], "big") + layer)
    return torch.randint(0, 256, (1, 1, num_bytes), generator=generator, dtype=torch.uint8)


@contextmanager
def opened(
    path: Path, memory: Memory, bounds: Bounds = ROOMY, rates: Rates = RATES, **options: Any
) -> Iterator[PrefixStore]:
    """A store of *memory* in the folder *path*."""
    reader = DirectReader(2)
    tier = LocalTier(StoreFolder(path), "a" * 40, {"model": "test"}, bounds, reader)
    store = PrefixStore(
        memory.layers, PAGE_TOKENS, CODECS["none"], lambda: rates, tier=tier,
        open_tier=lambda is_stopped: tier, is_current=lambda: True, recurrent=memory.recurrent,
        **{"load": "always", **options},
    )  # fmt: skip
    try:
        yield store
    finally:
        store.close()
        reader.close()


def publish(store: PrefixStore, memory: Memory, keys: Sequence[bytes], boundaries: Sequence[int]) -> None:
    """Compute all pages of *keys*, and store them with the states after so many of them."""
    for page, key in enumerate(keys):
        memory.compute_page(key, page)
    store.publish(Published(tuple(keys), b"", tuple(range(len(keys)))), 1.0)
    for slot, boundary in enumerate(boundaries):
        memory.compute_state(keys[boundary - 1], slot)
        store.publish_state(PublishedState(keys[boundary - 1], slot, PAGE_TOKENS), 1.0)
    store.flush()


def load_pages(store: PrefixStore, keys: Sequence[bytes], pages: Sequence[int]) -> None:
    """Bring *pages*, which number both *keys* and frames."""
    bring(store.loader, [PageLoad(keys[page], page) for page in pages])


def load_state(store: PrefixStore, key: bytes, slot: int) -> None:
    """Bring the states after page *key* to *slot*."""
    bring(store.state_loader, [PageLoad(snapshot_key(key), slot)])


def bring(loader: PageLoader, loads: Sequence[PageLoad]) -> None:
    """As a sweep does."""
    try:
        loader.begin(loads)
        for layer in range(len(loader._layers)):
            loader.wait(layer)
    finally:
        loader.abort()


def new_snapshot(key: bytes, seconds: float = 1.0) -> NewPages:
    """The states after page *key*, for a tier."""
    nothing = torch.empty((1, 1, 0), dtype=torch.uint8)
    shapes = tuple(shape.page for shape in STATES)
    return NewPages(
        keys=(snapshot_key(key),),
        parent=key,
        page_tokens=SNAPSHOT_TOKENS,
        codec="none",
        shapes=shapes,
        encode_layer=lambda layer: [CODECS["none"].encode(state_after(key, layer, shapes[layer].key_width), nothing)],
        num_bytes=sum(padded(shape.key_width) for shape in shapes),
        seconds=seconds,
    )


def expected_state(key: bytes) -> dict[tuple[bytes, int], bytes]:
    """What :func:`tests.store.pages.read_back` is to give of the states after page *key*."""
    return {
        (snapshot_key(key), layer): state_after(key, layer, shape.num_bytes).numpy().tobytes()
        for layer, shape in enumerate(STATES)
    }

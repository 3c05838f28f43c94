"""Small pages with known contents, for tests that need no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from layerstream.hardware.reader import DirectReader
from layerstream.kv.shape import PageShape
from layerstream.store.codecs import CODECS
from layerstream.store.segment import padded
from layerstream.store.tiers.base import NewPages
from layerstream.store.tiers.folder import Bounds, StoreFolder
from layerstream.store.tiers.local import LocalTier

PAGE_TOKENS = 4
SHAPES = (PageShape(2, 8, 2, 8, "float32"), PageShape(1, 24, 1, 8, "float32"), PageShape(2, 8, 2, 8, "float32"))
"""Three layers; the second has another shape, as latents do."""

ROOMY = Bounds(2**40, 0)


def chain(*names: object) -> tuple[bytes, ...]:
    """Keys of a prefix whose pages are called *names*."""
    keys, parent = [], b""
    for name in names:
        parent = hashlib.sha256(parent + repr(name).encode()).digest()
        keys.append(parent)
    return tuple(keys)


def contents(key: bytes, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What page *key* holds in *layer*: random, the same every time."""
    generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "big") + layer)
    shape = SHAPES[layer]
    keys = torch.randn((PAGE_TOKENS, shape.key_heads, shape.key_width), generator=generator)
    values = torch.randn((PAGE_TOKENS, shape.value_heads, shape.value_width), generator=generator)
    return keys, values


def new_pages(keys: Sequence[bytes], parent: bytes = b"", codec: str = "none", seconds: float = 1.0) -> NewPages:
    encoder = CODECS[codec]
    return NewPages(
        keys=tuple(keys),
        parent=parent,
        page_tokens=PAGE_TOKENS,
        codec=codec,
        shapes=SHAPES,
        encode_layer=lambda layer: [encoder.encode(*contents(key, layer)) for key in keys],
        num_bytes=sum(padded(encoder.num_bytes(shape, PAGE_TOKENS)) for shape in SHAPES) * len(keys),
        seconds=seconds,
    )


def open_tier(path: Path, namespace: str = "a" * 40, bounds: Bounds = ROOMY, reader: object = None) -> LocalTier:
    return LocalTier(StoreFolder(path), namespace, {"model": "test"}, bounds, reader)  # type: ignore[arg-type]


def read_back(tier: LocalTier, keys: Sequence[bytes]) -> dict[tuple[bytes, int], bytes]:
    """The encoded page-layers of *keys*, as far as the tier has them."""
    found = {}
    tier.contains(keys)
    for run in tier.open(keys):
        segment = run._segment  # type: ignore[attr-defined]
        data = segment.path.read_bytes()
        for slot in run.slots:
            for layer, size in enumerate(run.info.encoded_bytes):
                at = run.info.layer_offsets[layer] + slot * padded(size)
                found[run.info.keys[slot], layer] = data[at : at + size]
        opened = tier.opened
        segment_reader, opened._reader = opened._reader, _Forgetful()  # type: ignore[assignment]
        run.close()
        opened._reader = segment_reader
    return found


def expected(key: bytes, layer: int) -> bytes:
    return b"".join(bytes(buffer) for buffer in CODECS["none"].encode(*contents(key, layer)))


class _Forgetful:
    def forget(self, path: Path) -> None:
        """Nothing was opened."""


def direct_reader() -> DirectReader:
    return DirectReader(2)

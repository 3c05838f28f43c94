"""GGUF's Q4_0 and Q4_1 in the tiles that torch's kernel reads: as many bytes as GGUF has, in another order."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import torch

from layerstream.checkpoint.codecs.base import Planes
from layerstream.checkpoint.codecs.ggml import Ggml
from layerstream.checkpoint.codecs.tiled import TILE, TiledInt4, tile_codes

_NUM_SCALES = {gguf.GGMLQuantizationType.Q4_0: 1, gguf.GGMLQuantizationType.Q4_1: 2}  # fp16, where a block begins


@dataclass(frozen=True)
class TiledGgml(TiledInt4):
    """GGUF's Q4_0 and Q4_1 in tiles, nothing rounded: codes as they are, and in fp16 the scale of each 32 and, of Q4_1,
    what code 0 stands for: ``(tiles, groups, 64, 1 or 2)``. The kernel, which takes bfloat16, gets them rounded."""

    group: int = 32
    has_lowest: bool = False

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, and scales."""
        shapes = super().expected(rows, columns)
        return shapes | {"scale": (*shapes["scale"][:-1], 1 + self.has_lowest)}

    def lines(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :mod:`layerstream.checkpoint.codecs.ggml` has them."""
        scale = stored[..., 0].to(torch.float32)
        return scale, stored[..., 1].to(torch.float32) if self.has_lowest else -8 * scale

    @property
    def is_centred(self) -> bool:  # type: ignore[override]
        """Of Q4_1 offsets are what code 0 stands for."""
        return not self.has_lowest

    def pairs(self, stored: torch.Tensor) -> torch.Tensor:
        """Rounded."""
        pairs = torch.zeros((*stored.shape[:-1], 2), dtype=torch.bfloat16, device=stored.device)
        pairs[..., 0] = stored[..., 0]
        if self.has_lowest:
            scale, lowest = self.lines(stored)
            pairs[..., 1] = lowest + 8 * scale
        return pairs


def can_be_tiled(codec: object, rows: int, columns: int) -> bool:
    """Whether a matrix of *codec* is the same in tiles."""
    is_plain = isinstance(codec, Ggml) and codec.kind in _NUM_SCALES and not codec.offset and not codec.transposes
    return is_plain and rows % TILE == 0 and columns % TiledGgml.group == 0


def tiled_ggml(codec: Ggml) -> TiledGgml:
    """What a matrix of *codec* is in tiles."""
    return TiledGgml(has_lowest=_NUM_SCALES[codec.kind] == 2)


def tile_blocks(codec: Ggml, planes: Planes, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """*planes* of *rows*, a multiple of 64, in tiles: codes, and scales."""
    blocks = codec.blocks(planes, rows).view(-1, gguf.GGML_QUANT_SIZES[codec.kind][1])
    count = _NUM_SCALES[codec.kind]
    scales = blocks[:, : 2 * count].contiguous().view(torch.float16).view(-1, TILE, len(blocks) // rows, count)
    return tile_codes(codec.affine(planes, rows)[0]), scales.transpose(1, 2).contiguous()

"""GGUF's block types, through transformers' and the gguf package's own dequantisers.

llama.cpp's converter changes some weights on the way: it interleaves the two halves of each rotary head in the queries
and keys of Llama models, and adds one to Gemma's norms. Both are undone here.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import torch
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from layerstream.checkpoint.codecs.base import Codec, Planes

_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_BY_NUMPY = {
    gguf.GGMLQuantizationType.Q5_0,
    gguf.GGMLQuantizationType.Q5_1,
    gguf.GGMLQuantizationType.MXFP4,
}
_NIBBLES = {  # where the codes begin in a block, and how many bytes have the lower halves of neighbours
    gguf.GGMLQuantizationType.Q4_0: (2, 16),
    gguf.GGMLQuantizationType.Q4_1: (4, 16),
    gguf.GGMLQuantizationType.Q4_K: (16, 32),
}
_NIBBLE_GROUP = 32
SUPPORTED = frozenset({*_PLAIN, *_BY_NUMPY, *map(gguf.GGMLQuantizationType, GGML_BLOCK)})


@dataclass(frozen=True)
class Ggml(Codec):
    """Rows of blocks. *head_rows* are the rows of a head whose halves are interleaved; *offset* was added."""

    kind: gguf.GGMLQuantizationType
    head_rows: int = 0
    offset: float = 0.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """As llama.cpp calls it."""
        return self.kind.name

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Heads are not cut."""
        return self.head_rows or 1

    @property
    def is_quantised(self) -> bool:
        """Whether it is blocks, and no plain numbers."""
        return self.kind not in _PLAIN

    def stacked(self, count: int) -> Codec | None:
        """GGUF has experts stacked already."""
        return None

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Bytes of whole blocks."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return {"weight": (rows, columns // block_values * block_bytes)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """In fp32, rounded once."""
        values = self._values(self._rows(planes, out.shape[0])).view(out.shape)
        out.copy_(values - self.offset if self.offset else values)

    def affine_group(self, columns: int) -> int:
        """Of the kinds whose values are linear in their codes."""
        return _NIBBLE_GROUP if self.kind in _NIBBLES and not self.offset else 0

    def affine(self, planes: Planes, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scales and offsets are those of the line through the values that the lowest and the highest code have."""
        start, width = _NIBBLES[self.kind]
        stored = self._rows(planes, rows)
        blocks = stored.view(-1, gguf.GGML_QUANT_SIZES[self.kind][1]).clone()
        halves = blocks[:, start:].unflatten(1, (-1, 1, width))
        codes = torch.cat([halves & 15, halves >> 4], dim=2).view(rows, -1)
        blocks[:, start:] = 0
        lowest = self._values(blocks).view(rows, -1)[:, ::_NIBBLE_GROUP]
        blocks[:, start:] = 255
        highest = self._values(blocks).view(rows, -1)[:, ::_NIBBLE_GROUP]
        scale = (highest - lowest) / 15
        return codes, scale, lowest + 8 * scale

    def _rows(self, planes: Planes, rows: int) -> torch.Tensor:
        """The bytes of each row, in the model's order."""
        stored = planes["weight"].view(rows, -1)
        if self.head_rows:
            heads = stored.view(-1, self.head_rows // 2, 2, stored.shape[1])
            stored = heads.transpose(1, 2).reshape(stored.shape)
        return stored

    def _values(self, stored: torch.Tensor) -> torch.Tensor:
        if self.kind in _PLAIN:
            return stored.view(_PLAIN[self.kind]).to(torch.float32)
        if self.kind in _BY_NUMPY:
            return torch.from_numpy(gguf.quants.dequantize(stored.cpu().numpy(), self.kind)).to(stored.device)
        return dequantize(stored.reshape(-1), int(self.kind), torch.float32)

"""GGUF's block types, through transformers' and the gguf package's own dequantisers.

llama.cpp's converter changes some weights on the way: it interleaves the two halves of each rotary head in the queries
and keys of Llama models, parts gpt-oss's gate rows from its up rows, transposes experts, and adds one to Gemma's norms.
All of that is undone here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import gguf
import torch
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from layerstream.checkpoint.codecs.base import Codec, Planes, nibbles, stored_as
from layerstream.checkpoint.codecs.mxfp4 import VALUES

_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_FIVE_BITS = {gguf.GGMLQuantizationType.Q5_0, gguf.GGMLQuantizationType.Q5_1}
_MXFP4 = gguf.GGMLQuantizationType.MXFP4
_LINEAR = frozenset({gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q4_K})
_NIBBLES = {  # where codes of four bits begin in a block, and how many bytes have the lower halves of neighbours
    gguf.GGMLQuantizationType.Q4_0: (2, 16),
    gguf.GGMLQuantizationType.Q4_1: (4, 16),
    gguf.GGMLQuantizationType.Q4_K: (16, 32),
    _MXFP4: (1, 16),
}
_NIBBLE_GROUP = 32
_LOW = 0x0F0F0F0F0F0F0F0F  # the lower halves of eight bytes
CACHED_VALUES = 2**20  # decoded at a time: what they are computed from stays in the processor's cache
SUPPORTED = frozenset({*_PLAIN, *_FIVE_BITS, _MXFP4, *map(gguf.GGMLQuantizationType, GGML_BLOCK)})


@dataclass(frozen=True)
class Ggml(Codec):
    """Rows of blocks.

    Attributes:
        swapped: ``(a, b)``: rows stand in units of *a* times *b*, which the model has as *b* times *a*.
        offset: what was added to all values.
    """

    kind: gguf.GGMLQuantizationType
    swapped: tuple[int, int] | None = None
    offset: float = 0.0
    transposes: bool = False  # type: ignore[misc]

    dtypes = stored_as(weight="U8")

    @property
    def name(self) -> str:  # type: ignore[override]
        """As llama.cpp calls it."""
        return self.kind.name

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Units are not cut."""
        return prod(self.swapped) if self.swapped else 1

    @property
    def work_bytes(self) -> int:  # type: ignore[override]
        """Codes, and little else, where values are linear in them."""
        return 2 if self.kind in _LINEAR and not self.offset else super().work_bytes

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
        stored = self.blocks(planes, out.shape[0])
        if not out.is_cpu and self.affine_group(out.shape[1]):
            _at_once(stored, self.kind, out.view(len(out), -1, 2, _NIBBLES[self.kind][1]).transpose(1, 2))
            return
        for part in _parts(out):
            values = self._values(stored[part]).view(-1, out.shape[1])
            out[part] = values - self.offset if self.offset else values

    def decode_arranged(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """All lower halves of bytes, then all upper ones: pieces of 16 columns would cost more than all else."""
        if not self.affine_group(out.shape[1]):
            self.decode(planes, first, out)
            return
        stored = self.blocks(planes, out.shape[0])
        if not out.is_cpu:
            _at_once(stored, self.kind, out.view(len(out), 2, -1, _NIBBLES[self.kind][1]))
            return
        for part in _parts(out):
            _halves(stored[part], self.kind, out[part])

    def arranged(self, inputs: torch.Tensor) -> torch.Tensor:
        """So that they meet those."""
        if not self.affine_group(inputs.shape[1]):
            return inputs
        width = _NIBBLES[self.kind][1]
        return inputs.unflatten(1, (-1, 2, width)).transpose(1, 2).reshape(inputs.shape)

    def affine_group(self, columns: int) -> int:
        """Of the kinds whose values are linear in their codes."""
        return _NIBBLE_GROUP if self.kind in _LINEAR and not self.offset else 0

    def affine(self, planes: Planes, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Offsets are what code 8 stands for."""
        blocks = self.blocks(planes, rows).view(-1, gguf.GGML_QUANT_SIZES[self.kind][1])
        scale, lowest = _scales(blocks, self.kind)
        return _codes(blocks, self.kind).view(rows, -1), scale.view(rows, -1), (lowest + 8 * scale).view(rows, -1)

    def blocks(self, planes: Planes, rows: int) -> torch.Tensor:
        """The bytes of each row, in the model's order."""
        stored = planes["weight"].view(rows, -1)
        if self.swapped:
            stored = stored.view(-1, *self.swapped, stored.shape[1]).transpose(1, 2).reshape(stored.shape)
        return stored

    def _values(self, stored: torch.Tensor) -> torch.Tensor:
        if self.kind in _PLAIN:
            return stored.view(_PLAIN[self.kind]).to(torch.float32)
        blocks = stored.reshape(-1, gguf.GGML_QUANT_SIZES[self.kind][1])
        if self.kind in _LINEAR:
            return _nibbles(blocks, self.kind)
        if self.kind == _MXFP4:
            return _mxfp4(blocks)
        if self.kind in _FIVE_BITS:
            return _five_bits(blocks, self.kind)
        return dequantize(stored.reshape(-1), int(self.kind), torch.float32)


def block_values(kind: gguf.GGMLQuantizationType, num_bytes: int) -> int:
    """How many values *num_bytes* of whole blocks stand for."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    return num_bytes // size * values


def _parts(out: torch.Tensor) -> list[slice]:
    """The rows that are decoded at a time."""
    step = max(1, CACHED_VALUES // out.shape[1]) if out.is_cpu else len(out)
    return [slice(start, start + step) for start in range(0, len(out), step)]


def _at_once(stored: torch.Tensor, kind: gguf.GGMLQuantizationType, out: torch.Tensor) -> None:
    """Rows of blocks to *out* ``(rows, 2, pieces, width)``: the values of the lower halves of each piece of bytes, and
    of the upper ones. By few operators, for an accelerator."""
    rows, _, pieces, width = out.shape
    start = _NIBBLES[kind][0]
    blocks = stored.view(rows, -1, gguf.GGML_QUANT_SIZES[kind][1])
    codes = nibbles(blocks[..., start:].unflatten(-1, (-1, width)), 1).view(out.shape)
    if kind == gguf.GGMLQuantizationType.Q4_K:
        scale, lowest = (part.reshape(rows, 2, pieces, 1) for part in _six_bits(blocks))
    else:
        both = blocks[..., :start].view(torch.float16).to(torch.float32)[:, None]
        scale = both[..., :1]
        lowest = -8 * scale if kind == gguf.GGMLQuantizationType.Q4_0 else both[..., 1:]
    torch.addcmul(lowest, codes, scale, out=out)


def _six_bits(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_scales` for *blocks* ``(rows, blocks, bytes)`` of Q4_K: ``(rows, 2, blocks, 4)``, first those of lower
    halves."""
    first = blocks[..., 4:12].unflatten(-1, (2, 4))  # scales, minima: of four groups, with two bits of the other four
    codes = blocks.new_empty((*first.shape[:-1], 2, 4))
    torch.bitwise_and(first, 63, out=codes[..., 0, :])
    torch.add(nibbles(blocks[..., 12:16], 2), first >> 6, alpha=16, out=codes[..., 1, :])
    factors = blocks[..., :4].view(torch.float16).to(torch.float32)[..., None]
    scale, minimum = (factors * codes.flatten(-2)).unflatten(-1, (4, 2)).permute(2, 0, 4, 1, 3)
    return scale, -minimum


def _five_bits(blocks: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """Values ``(blocks, 32)`` of Q5_0 and Q5_1, as ``gguf.quants`` has them: the fifth bits of all codes come first."""
    both = blocks[:, : 2 if kind == gguf.GGMLQuantizationType.Q5_0 else 4].view(torch.float16).to(torch.float32)
    bits, halves = blocks[:, -20:-16], nibbles(blocks[:, -16:], 1).view(-1, 32)
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    high = ((bits[:, :, None] >> places) & 1).view(-1, 32)
    codes = torch.add(halves, high, alpha=16).to(torch.float32)
    if kind == gguf.GGMLQuantizationType.Q5_0:
        return codes.sub_(16).mul_(both)
    return codes.mul_(both[:, :1]).add_(both[:, 1:])


def _scales(blocks: torch.Tensor, kind: gguf.GGMLQuantizationType) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each 32 values, ``(blocks, groups)`` in fp32: what a step of their codes is worth, and what code 0 is."""
    first, second = (blocks[:, at : at + 2].view(torch.float16).to(torch.float32) for at in (0, 2))
    if kind == gguf.GGMLQuantizationType.Q4_0:
        return first, -8 * first
    if kind == gguf.GGMLQuantizationType.Q4_1:
        return first, second
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]  # Q4_K: eight scales and minima of six bits
    scale = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=1)
    minimum = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], dim=1)
    return first * scale, -second * minimum


def _halves(stored: torch.Tensor, kind: gguf.GGMLQuantizationType, out: torch.Tensor) -> None:
    """Rows of blocks to *out*, the values of lower halves of bytes first."""
    rows, columns = out.shape
    start, width = _NIBBLES[kind]
    blocks = stored.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    scale, lowest = _scales(blocks, kind)
    both = blocks[:, start:].contiguous()
    of_halves = [part.reshape(-1, 2) if width == _NIBBLE_GROUP else part for part in (scale, lowest)]
    for number, codes in enumerate((both & 15, both >> 4)):
        step, base = (part[:, number, None] if width == _NIBBLE_GROUP else part for part in of_halves)
        values = codes.view(-1, width).to(torch.float32).mul_(step).add_(base)
        out[:, number * columns // 2 : (number + 1) * columns // 2] = values.view(rows, -1)


def _nibbles(blocks: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """Values of the kinds that are linear in codes of four bits. In fp32 nothing is rounded but the last sum."""
    scale, lowest = _scales(blocks, kind)
    values = _codes(blocks, kind).view(len(blocks), -1, _NIBBLE_GROUP).to(torch.float32)
    return values.mul_(scale[:, :, None]).add_(lowest[:, :, None])


def _codes(blocks: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """Codes ``(blocks, values)`` of those kinds, in uint8; worked on eight at a time."""
    start, width = _NIBBLES[kind]
    words = blocks[:, start:].contiguous().view(torch.int64).unflatten(1, (-1, width // 8))
    codes = torch.empty((*words.shape[:2], 2, width // 8), dtype=torch.int64, device=words.device)
    torch.bitwise_and(words, _LOW, out=codes[:, :, 0])
    torch.bitwise_and(words >> 4, _LOW, out=codes[:, :, 1])
    return codes.view(torch.uint8).view(len(blocks), -1)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of an exponent and 32 codes, the first 16 in the lower halves of bytes. Powers of two round nothing."""
    values = torch.tensor(VALUES, device=blocks.device)[_codes(blocks, _MXFP4).to(torch.int32)]
    return torch.ldexp(values, blocks[:, :1].to(torch.int32) - 127, out=values)

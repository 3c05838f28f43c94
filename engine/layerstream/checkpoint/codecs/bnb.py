"""bitsandbytes: nf4 and fp4 with and without double quantisation, int8 by rows.

Formulas: ``bitsandbytes.functional.dequantize_4bit`` and ``int8_vectorwise_dequant``. 4-bit codes are positions in a
table of 16 values; two neighbours share a byte, the first in its upper half; every *blocksize* values of the flattened
matrix share a scale. With double quantisation the scales are bytes: positions in a table of 256, with scales of their
own for every *nested_blocksize* of them, and an offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from layerstream.checkpoint.codecs import bnb_kernel
from layerstream.checkpoint.codecs.base import Codec, Planes, pair_table, stored_as
from layerstream.hardware.accelerators import can_run

CACHED_VALUES = 2**18  # decoded at a time: what they are computed from stays in the processor's cache
ALIGNMENT = 16  # bytes; torch's int8 kernel (2.13) ends the process where weights lie otherwise
INT8_UNIT = 7.874015718698502e-3  # 1 / 127, as bitsandbytes has it


@dataclass(frozen=True)
class Bnb4(Codec):
    """nf4 or fp4; *nested*: (block size, offset) of the scales' own quantisation."""

    name: str
    columns: int
    blocksize: int = 64
    nested: tuple[int, float] | None = None

    whole = frozenset({"quant_map", "nested_absmax", "nested_quant_map"})
    dtypes = stored_as(weight="U8", absmax="F32 F16 BF16 U8")

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Rows whose values fill whole blocks, and whole bytes."""
        return math.lcm(self.blocksize, self.columns) // self.columns

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes two to a byte, a scale per block, and tables."""
        blocks = -(-rows * columns // self.blocksize)
        planes: dict[str, tuple[int, ...]] = {
            "weight": (-(-rows * columns // 2), 1),
            "absmax": (blocks,),
            "quant_map": (16,),
        }
        if self.nested is not None:
            planes |= {"nested_absmax": (-(-blocks // self.nested[0]),), "nested_quant_map": (256,)}
        return planes

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Table lookup by bytes, each of which stands for two values."""
        codes = planes["weight"].reshape(-1)
        scales = self._scales(planes, first * self.columns // self.blocksize)
        if not out.is_contiguous() or out.numel() != len(scales) * self.blocksize:
            pairs = _pairs(planes["quant_map"])
            values = pairs.index_select(0, codes.to(torch.int32)).view(torch.float32)
            values = torch.nn.functional.pad(values, (0, len(scales) * self.blocksize - len(values)))
            values = values.view(-1, self.blocksize).mul_(scales[:, None]).view(-1)
            out.copy_(values[: out.numel()].view(out.shape))
        elif can_run("bitsandbytes", out.device):
            look_up = partial(self._look_up, codes, scales, planes["quant_map"], out)
            bnb_kernel.decode(self.name, self.blocksize, codes, scales, out, look_up)
        else:
            self._look_up(codes, scales, planes["quant_map"], out)

    def _look_up(self, codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
        """Whole blocks to *out*, contiguous."""
        pairs, blocks = _pairs(table), out.view(-1, self.blocksize)
        step = max(1, CACHED_VALUES // self.blocksize)
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            places = codes[start * self.blocksize // 2 : (start + step) * self.blocksize // 2].to(torch.int32)
            values = pairs.index_select(0, places).view(torch.float32).view(-1, self.blocksize)
            blocks[part] = values.mul_(scales[part, None])

    def _scales(self, planes: Planes, first: int) -> torch.Tensor:
        """Scales in fp32, of which the first is number *first* of the matrix."""
        absmax = planes["absmax"]
        if self.nested is None:
            return absmax.to(torch.float32)
        size, offset = self.nested
        numbers = torch.arange(first, first + len(absmax), device=absmax.device) // size
        own = planes["nested_quant_map"][absmax.long()] * planes["nested_absmax"][numbers]
        return own.add_(offset)


@dataclass(frozen=True)
class BnbInt8(Codec):
    """int8 with a scale per row (the largest absolute value), computed weight-only."""

    name: str = "int8"

    kernel = "int8"
    dtypes = stored_as(weight="I8")

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Values, and the largest of each row."""
        return {"weight": (rows, columns), "SCB": (rows,)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """In fp32, rounded once."""
        scales = planes["SCB"].to(torch.float32)
        torch.mul(planes["weight"].to(torch.float32).mul_(scales[:, None]), INT8_UNIT, out=out)

    def product(self, planes: Planes, inputs: torch.Tensor) -> torch.Tensor:
        """By torch's kernel; scaled afterwards, because it takes scales in bfloat16 only."""
        weight = aligned(planes["weight"])
        sums = torch.ops.aten._weight_int8pack_mm(inputs, weight, weight.new_ones(len(weight), dtype=inputs.dtype))
        return (sums * (planes["SCB"].to(torch.float32) * INT8_UNIT)).to(inputs.dtype)


def _pairs(table: torch.Tensor) -> torch.Tensor:
    """As :func:`pair_table`; on a device it is made there, because asking for the table's values would wait for all
    that is queued."""
    if table.is_cpu:
        return pair_table(tuple(table.tolist()), 4)
    codes = torch.arange(256, device=table.device)
    both = torch.stack([table[codes >> 4], table[codes & 15]], dim=1)
    return both.to(torch.float32).contiguous().view(torch.int64).view(-1)


def aligned(weight: torch.Tensor) -> torch.Tensor:
    """*weight*, or a copy where it lies askew, as transformers' files have it."""
    return weight if weight.data_ptr() % ALIGNMENT == 0 else weight.clone()

"""bitsandbytes: nf4 and fp4 with and without double quantisation, int8 by rows.

Formulas: ``bitsandbytes.functional.dequantize_4bit`` and ``int8_vectorwise_dequant``. 4-bit codes are positions in a
table of 16 values; two neighbours share a byte, the first in its upper half; every *blocksize* values of the flattened
matrix share a scale. With double quantisation the scales are bytes: positions in a table of 256, with scales of their
own for every *nested_blocksize* of them, and an offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial

import torch

from layerstream.checkpoint.codecs import bnb_kernel
from layerstream.checkpoint.codecs.base import Codec, Planes, pair_table, stored_as
from layerstream.hardware.accelerators import can_run

CACHED_VALUES = 2**18  # decoded at a time: what they are computed from stays in the processor's cache
DEVICE_PARTS = 8  # that a matrix is decoded in on an accelerator without the kernel: it takes six bytes a value
MOST_STEP = 64  # rows that matrices are cut at so that scales of scales are, too
PROBED_ROWS = 256  # of a matrix that a kernel is tried with
ALIGNMENT = 16  # bytes; torch's int8 kernel (2.13) ends the process where weights lie otherwise
INT8_UNIT = 7.874015718698502e-3  # 1 / 127, as bitsandbytes has it


@dataclass(frozen=True)
class Bnb4(Codec):
    """nf4 or fp4; *nested*: (block size, offset) of the scales' own quantisation."""

    name: str
    columns: int
    blocksize: int = 64
    nested: tuple[int, float] | None = None

    work_bytes = 1
    whole = frozenset({"quant_map", "nested_absmax", "nested_quant_map"})
    dtypes = stored_as(weight="U8", absmax="F32 F16 BF16 U8")

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Rows whose values fill whole blocks, and whole bytes; whole blocks of scales, too, if those are few."""
        step = math.lcm(self.blocksize, self.columns) // self.columns
        if self.nested is None:
            return step
        whole = math.lcm(self.blocksize * self.nested[0], self.columns) // self.columns
        return whole if whole <= MOST_STEP else step

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

    def device_rows(self, planes: Planes, first: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """As bitsandbytes' product was tuned for the card."""
        rows, columns = shape
        if columns % self.blocksize or not can_run("bitsandbytes", planes["weight"].device):
            return 0
        step = self.row_step
        some = min(rows, -(-PROBED_ROWS // step) * step)

        def formula() -> torch.Tensor:
            values = torch.empty((some, columns), dtype=dtype, device=planes["weight"].device)
            self.decode(self.cut(planes, rows, 0, some), first, values)
            return values

        return bnb_kernel.most_rows(self._packed(planes, first, columns), dtype, formula)

    def product(self, planes: Planes, inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
        """By bitsandbytes' kernel, which takes nested scales as they are."""
        return bnb_kernel.multiply(self._packed(planes, first, inputs.shape[1]), inputs)

    def _packed(self, planes: Planes, first: int, columns: int) -> bnb_kernel.Packed:
        """Rows from *first* on as the kernel takes them."""
        codes = aligned(planes["weight"])
        shape = 2 * codes.numel() // columns, columns
        block = first * columns // self.blocksize
        if self.nested is None or self.nested[0] != bnb_kernel.NESTED_BLOCK or block % bnb_kernel.NESTED_BLOCK:
            return bnb_kernel.Packed(self.name, self.blocksize, shape, codes, self._scales(planes, block))
        own = planes["nested_absmax"][block // bnb_kernel.NESTED_BLOCK :]
        offset = _on_device(self.nested[1], codes.device)
        nested = bnb_kernel.Nested(aligned(planes["absmax"]), planes["nested_quant_map"], offset)
        return bnb_kernel.Packed(self.name, self.blocksize, shape, codes, own, nested)

    def _look_up(self, codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
        """Whole blocks to *out*, contiguous."""
        pairs, blocks = _pairs(table), out.view(-1, self.blocksize)
        step = max(1, CACHED_VALUES // self.blocksize)
        if not codes.is_cpu:
            step = max(step, -(-len(blocks) // DEVICE_PARTS))
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            places = codes[start * self.blocksize // 2 : (start + step) * self.blocksize // 2].to(torch.int32)
            values = pairs.index_select(0, places).view(torch.float32).view(-1, self.blocksize)
            torch.mul(values, scales[part, None], out=blocks[part])

    def _scales(self, planes: Planes, first: int) -> torch.Tensor:
        """Scales in fp32, of which the first is number *first* of the matrix."""
        absmax = planes["absmax"]
        if self.nested is None:
            return absmax.to(torch.float32)
        size, offset = self.nested
        own, skipped = planes["nested_absmax"][first // size :], first % size
        if not skipped and can_run("bitsandbytes", absmax.device):
            return bnb_kernel.scales(absmax, own, planes["nested_quant_map"], size).add_(offset)
        found = planes["nested_quant_map"].index_select(0, absmax.to(torch.int32))
        return found.mul_(own.repeat_interleave(size)[skipped : skipped + len(absmax)]).add_(offset)


@dataclass(frozen=True)
class BnbInt8(Codec):
    """int8 with a scale per row (the largest absolute value), computed weight-only."""

    name: str = "int8"

    kernel = "int8"
    work_bytes = 4
    dtypes = stored_as(weight="I8")

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Values, and the largest of each row."""
        return {"weight": (rows, columns), "SCB": (rows,)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """In fp32, rounded once."""
        scales, weight = planes["SCB"].to(torch.float32), planes["weight"]
        values = weight.to(torch.float32).mul_(scales[:, None]) if weight.is_cpu else weight * scales[:, None]
        torch.mul(values, INT8_UNIT, out=out)

    def product(self, planes: Planes, inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
        """By torch's kernel; scaled afterwards, because it takes scales in bfloat16 only."""
        weight = aligned(planes["weight"])
        sums = torch.ops.aten._weight_int8pack_mm(inputs, weight, weight.new_ones(len(weight), dtype=inputs.dtype))
        return (sums * (planes["SCB"].to(torch.float32) * INT8_UNIT)).to(inputs.dtype)


def _pairs(table: torch.Tensor) -> torch.Tensor:
    """As :func:`pair_table`; on a device it is made there, because asking for the table's values would wait for all
    that is queued."""
    if table.is_cpu:
        return pair_table(tuple(table.tolist()), 4)
    upper, lower = table[:, None].expand(16, 16), table.expand(16, 16)
    return torch.stack([upper, lower], dim=-1).to(torch.float32).view(-1).view(torch.int64)


@cache
def _on_device(value: float, device: torch.device) -> torch.Tensor:
    """*value* as a scalar in fp32: it crosses once."""
    return torch.tensor(value, dtype=torch.float32, device=device)


def aligned(weight: torch.Tensor) -> torch.Tensor:
    """*weight*, or a copy where it lies askew, as transformers' files have it."""
    return weight if weight.data_ptr() % ALIGNMENT == 0 else weight.clone()

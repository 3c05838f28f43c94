"""4-bit integers; neighbours in a row share a scale, and perhaps a zero point: compressed-tensors, GPTQ, AWQ.

All pack eight codes into one int32, in formats of their own:

| format | codes | in the int32 | zero points |
|---|---|---|---|
| compressed-tensors | ``(rows, columns / 8)`` | lowest bits first | ``(rows / 8, groups)``; 8 if there are none |
| GPTQ | ``(columns / 8, rows)`` | lowest bits first | ``(groups, rows / 8)``, stored less one |
| AWQ | ``(columns, rows / 8)`` | in the order 0 2 4 6 1 3 5 7 | ``(groups, rows / 8)`` |

GPTQ and AWQ store columns of the transposed matrix side by side, so that rows cannot be cut out of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.checkpoint.codecs.base import Codec, Planes, stored_as

_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of the values 0, 1, 2, … of an int32


def unpack(packed: torch.Tensor, dim: int, shifts: tuple[int, ...] = tuple(range(0, 32, 4))) -> torch.Tensor:
    """Eight codes for each int32, along *dim*: uint8 in 0…15."""
    by_shift = [(packed >> shift).bitwise_and_(15).to(torch.uint8) for shift in shifts]
    dim %= packed.dim()
    return torch.stack(by_shift, dim=dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True)
class CompressedInt4(Codec):
    """compressed-tensors' ``pack-quantized`` with 4 bits."""

    group: int
    is_symmetric: bool
    name: str = "int4"
    dtypes = stored_as(weight="I32", zero="I32")

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Eight rows' zero points share an int32."""
        return 1 if self.is_symmetric else 8

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, scales, and zero points if there are any."""
        groups = columns // self.group
        planes = {"weight": (rows, -(-columns // 8)), "scale": (rows, groups)}
        return planes if self.is_symmetric else planes | {"zero": (-(-rows // 8), groups)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """``(code - zero) * scale`` in fp32."""
        rows, columns = out.shape
        codes = unpack(planes["weight"], 1)[:, :columns].reshape(rows, -1, self.group).to(torch.float32)
        zero = unpack(planes["zero"], 0)[:rows, :, None].to(torch.float32) if "zero" in planes else 8.0
        scaled = codes.sub_(zero).mul_(planes["scale"].to(torch.float32)[:, :, None])
        out.copy_(scaled.view(rows, columns))

    def affine_group(self, columns: int) -> int:
        """All of it is."""
        return self.group

    def affine(self, planes: Planes, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Zero points become offsets."""
        scale = planes["scale"].to(torch.float32)
        zero = unpack(planes["zero"], 0)[:rows].to(torch.float32) if "zero" in planes else 8.0
        columns = scale.shape[1] * self.group
        return unpack(planes["weight"], 1)[:, :columns], scale, (8.0 - zero) * scale


@dataclass(frozen=True)
class Gptq(Codec):
    """GPTQ with 4 bits; *zero_shift* is what its zero points were stored less; *in_order*: neighbours form groups."""

    group: int
    zero_shift: int = 1
    in_order: bool = False
    name: str = "gptq"
    row_step = 0
    dtypes = stored_as(weight="I32", zero="I32", g_idx="I32 I64")

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, scales, zero points, and the group of each column."""
        groups = -(-columns // self.group)
        return {
            "weight": (columns // 8, rows),
            "scale": (groups, rows),
            "zero": (groups, rows // 8),
            "g_idx": (columns,),
        }

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """``(code - zero) * scale`` in fp32, transposed."""
        group = planes["g_idx"].long()
        zero = unpack(planes["zero"], 1).to(torch.float32).add_(self.zero_shift)
        codes = unpack(planes["weight"], 0).to(torch.float32)
        out.copy_(codes.sub_(zero[group]).mul_(planes["scale"].to(torch.float32)[group]).T)

    def affine_group(self, columns: int) -> int:
        """Unless columns were sorted by their weight in the error."""
        return self.group if self.in_order else 0

    def affine(self, planes: Planes, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Transposed; zero points become offsets."""
        zero = unpack(planes["zero"], 1).to(torch.float32).add_(self.zero_shift)
        scale = planes["scale"].to(torch.float32)
        return unpack(planes["weight"], 0).T, scale.T, ((8.0 - zero) * scale).T


@dataclass(frozen=True)
class Awq(Codec):
    """AWQ with 4 bits, in the layout of its matrix product kernel (``gemm``)."""

    group: int
    name: str = "awq"
    row_step = 0
    dtypes = stored_as(weight="I32", zero="I32")

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, scales and zero points."""
        groups = columns // self.group
        return {"weight": (columns, rows // 8), "scale": (groups, rows), "zero": (groups, rows // 8)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """``(code - zero) * scale`` in fp32, transposed."""
        rows, columns = out.shape
        codes = unpack(planes["weight"], 1, _AWQ_SHIFTS).to(torch.float32).view(-1, self.group, rows)
        zero = unpack(planes["zero"], 1, _AWQ_SHIFTS).to(torch.float32)
        codes = codes.sub_(zero[:, None]).mul_(planes["scale"].to(torch.float32)[:, None])
        out.copy_(codes.view(columns, rows).T)

    def affine_group(self, columns: int) -> int:
        """All of it is."""
        return self.group

    def affine(self, planes: Planes, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Transposed; zero points become offsets."""
        zero = unpack(planes["zero"], 1, _AWQ_SHIFTS).to(torch.float32)
        scale = planes["scale"].to(torch.float32)
        return unpack(planes["weight"], 1, _AWQ_SHIFTS).T, scale.T, ((8.0 - zero) * scale).T

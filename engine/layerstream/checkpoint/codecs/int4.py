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

from layerstream.checkpoint.codecs.base import Codec, Planes, in_dtype, nibbles, stored_as

_IN_ORDER = tuple(range(0, 32, 4))
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of the values 0, 1, 2, … of an int32


def unpack(packed: torch.Tensor, dim: int, shifts: tuple[int, ...] = _IN_ORDER) -> torch.Tensor:
    """Eight codes for each int32, along *dim*: uint8 in 0…15."""
    if not packed.is_cpu:
        return _unpack_bytes(packed, dim % packed.dim(), shifts)
    by_shift = [(packed >> shift).bitwise_and_(15).to(torch.uint8) for shift in shifts]
    dim %= packed.dim()
    return torch.stack(by_shift, dim=dim + 1).flatten(dim, dim + 1)


def _unpack_bytes(packed: torch.Tensor, dim: int, shifts: tuple[int, ...], *, less_eight: bool = False) -> torch.Tensor:
    """As :func:`unpack`, by two operators, *less_eight* in int8: bytes one after the other, the lower halves first."""
    found = packed.view(torch.uint8).unflatten(1, (-1, 4))
    out = found.new_empty((*packed.shape[: dim + 1], 8, *packed.shape[dim + 1 :]))
    by_code = out if dim == 1 else out.transpose(1, 2)
    if shifts == _AWQ_SHIFTS:  # of a code's number in binary, abc: byte ca, half b
        by_half = by_code.unflatten(2, (2, 2, 2))
        nibbles(found.unflatten(2, (2, 2)).transpose(2, 3), 3, by_half)
        return out.flatten(dim, dim + 1)
    codes = nibbles(found, 3, by_code.unflatten(2, (4, 2)), less_eight=less_eight)
    return out.view(codes.dtype).flatten(dim, dim + 1)


@dataclass(frozen=True)
class CompressedInt4(Codec):
    """compressed-tensors' ``pack-quantized`` with 4 bits."""

    group: int
    is_symmetric: bool
    name: str = "int4"
    work_bytes = 2
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
        if not out.is_cpu:
            self._decode_at_once(planes, out)
            return
        codes = unpack(planes["weight"], 1)[:, :columns].reshape(rows, -1, self.group).to(torch.float32)
        zero = unpack(planes["zero"], 0)[:rows, :, None].to(torch.float32) if "zero" in planes else 8.0
        scaled = codes.sub_(zero).mul_(planes["scale"].to(torch.float32)[:, :, None])
        out.copy_(scaled.view(rows, columns))

    def _decode_at_once(self, planes: Planes, out: torch.Tensor) -> None:
        """By few operators, for an accelerator."""
        rows, columns = out.shape
        codes = _unpack_bytes(planes["weight"], 1, _IN_ORDER, less_eight="zero" not in planes)[:, :columns]
        grouped = codes.view(torch.int8).unflatten(1, (-1, self.group))
        if "zero" in planes:
            grouped = grouped - unpack(planes["zero"], 0)[:rows, :, None].view(torch.int8)
        scale = in_dtype(planes["scale"], out.dtype)[:, :, None]
        torch.mul(grouped, scale, out=out.unflatten(1, (-1, self.group)))

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

    @property
    def work_bytes(self) -> int:  # type: ignore[override]
        """Columns that are not in order have scales and zero points each."""
        return 2 if self.in_order else super().work_bytes

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
        if self.in_order and not out.is_cpu and out.shape[1] % self.group == 0:
            zero = unpack(planes["zero"], 1) + self.zero_shift
            _decode_transposed(unpack(planes["weight"], 0), zero, planes["scale"], out)
            return
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
    work_bytes = 2
    dtypes = stored_as(weight="I32", zero="I32")

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, scales and zero points."""
        groups = columns // self.group
        return {"weight": (columns, rows // 8), "scale": (groups, rows), "zero": (groups, rows // 8)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """``(code - zero) * scale`` in fp32, transposed."""
        rows, columns = out.shape
        if not out.is_cpu:
            codes, zero = (unpack(planes[name], 1, _AWQ_SHIFTS) for name in ("weight", "zero"))
            _decode_transposed(codes, zero, planes["scale"], out)
            return
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


def _decode_transposed(codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``(code - zero) * scale`` to *out* ``(rows, columns)``, by few operators, for an accelerator.

    Args:
        codes: ``(columns, rows)`` uint8.
        zero, scale: ``(groups, rows)``; zero points in uint8.
    """
    grouped = codes.view(torch.int8).unflatten(0, (len(scale), -1)) - zero.view(torch.int8)[:, None]
    torch.mul(grouped, in_dtype(scale, out.dtype)[:, None], out=out.T.unflatten(0, (len(scale), -1)))

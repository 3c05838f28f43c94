"""FP8 with block scales (DeepSeek-V3, Qwen3-FP8) or with scales by row or tensor (compressed-tensors)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.checkpoint.codecs.base import Codec, Planes, stored_as


@dataclass(frozen=True)
class Fp8(Codec):
    """e4m3 values, each times the scale of its block, in fp32: ``value[i, j] * scale[i // b0, j // b1]``.

    Attributes:
        rows: of the matrix as it was quantised; of several one below the other, each begins with a block of its own.
        block: rows and columns of a block; the last ones of a matrix may be smaller. A scale for each row, or for the
            whole matrix, is a block of that size.
        scale_dims: dimensions that the stored scales have; those that are left out are 1.
    """

    rows: int
    block: tuple[int, int]
    scale_dims: int = 2
    name: str = "fp8"

    whole = frozenset({"scale"})
    dtypes = stored_as(weight="F8_E4M3", scale="F32 F16 BF16 F8_E8M0 U8")

    def stacked(self, count: int) -> Codec | None:
        """Grids of scales one below the other."""
        return self if self.scale_dims else None

    def one_of(self, count: int) -> Codec | None:
        """Its own grid."""
        return self if self.scale_dims else None

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Values, and the grid of scales."""
        grid = rows // self.rows * self._grid_rows, -(-columns // self.block[1])
        return {"weight": (rows, columns), "scale": grid[: self.scale_dims]}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Each value times the scale of its block; columns of the last blocks apart where they are fewer."""
        scale, width = planes["scale"], self.block[1]
        if scale.dtype == torch.uint8:  # exponents
            scale = (scale.to(torch.float32) - 127).exp2()
        num_rows, columns = out.shape
        rows = torch.arange(first, first + num_rows, device=scale.device)
        places = rows // self.rows * self._grid_rows + rows % self.rows // self.block[0]
        of_rows = scale.to(torch.float32).reshape(-1, -(-columns // width))[places]
        values = _numbers(planes["weight"]).view(num_rows, columns)
        even = columns // width * width
        if even:
            blocks = values[:, :even].unflatten(1, (-1, width))
            torch.mul(blocks, of_rows[:, : even // width, None], out=out[:, :even].unflatten(1, (-1, width)))
        if even < columns:
            torch.mul(values[:, even:], of_rows[:, -1:], out=out[:, even:])

    @property
    def _grid_rows(self) -> int:
        return -(-self.rows // self.block[0])


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 in fp32, exactly: its bits, put where bfloat16 has them, are the number times 2 to the -120.

    torch's own conversion takes ten times as long. Codes for "not a number" become 480.
    """
    bits = codes.view(torch.uint8).to(torch.int16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
    return bits.view(torch.bfloat16).to(torch.float32).mul_(2.0**120)

"""FP8 with block scales (DeepSeek-V3, Qwen3-FP8) or with scales by row or tensor (compressed-tensors)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.checkpoint.codecs.base import Codec, Planes


@dataclass(frozen=True)
class Fp8(Codec):
    """e4m3 values, each times the scale of its block. *scale_shape* is that of the grid of blocks.

    Formula: transformers' ``Fp8Dequantize``: the grid divides the matrix evenly, all in fp32.
    """

    rows: int
    scale_shape: tuple[int, ...]
    name: str = "fp8"

    whole = frozenset({"scale"})

    def stacked(self, count: int) -> Codec | None:
        """Grids of scales one below the other."""
        if len(self.scale_shape) != 2:
            return None
        return Fp8(self.rows * count, (self.scale_shape[0] * count, self.scale_shape[1]))

    def one_of(self, count: int) -> Codec | None:
        """Its own part of the grid."""
        if len(self.scale_shape) != 2 or self.rows % count or self.scale_shape[0] % count:
            return None
        return Fp8(self.rows // count, (self.scale_shape[0] // count, self.scale_shape[1]))

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Values, and the grid of scales."""
        return {"weight": (rows, columns), "scale": self.scale_shape}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Each row of blocks in turn, as far as it is wanted."""
        scale = planes["scale"]
        if scale.dtype == torch.uint8:  # exponents
            scale = (scale.to(torch.float32) - 127).exp2()
        scale = scale.to(torch.float32).reshape(scale.shape[0] if scale.dim() else 1, -1)
        block_rows, num_rows = self.rows // scale.shape[0], out.shape[0]
        of_rows = scale[torch.arange(first, first + num_rows, device=scale.device) // block_rows]
        values = _numbers(planes["weight"]).view(num_rows, scale.shape[1], -1)
        torch.mul(values, of_rows[:, :, None], out=out.view(values.shape))


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 in fp32, exactly: its bits, put where bfloat16 has them, are the number times 2 to the -120.

    torch's own conversion takes ten times as long. Codes for "not a number" become 480.
    """
    bits = codes.view(torch.uint8).to(torch.int16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
    return bits.view(torch.bfloat16).to(torch.float32).mul_(2.0**120)

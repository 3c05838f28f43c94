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
        values = planes["weight"].to(torch.float32).view(num_rows, scale.shape[1], -1)
        out.copy_(values.mul_(of_rows[:, :, None]).view(num_rows, -1))

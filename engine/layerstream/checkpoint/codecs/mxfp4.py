"""MXFP4 as gpt-oss has it: 4-bit floats (e2m1), 32 neighbours share a power of two.

Formula: ``transformers.integrations.mxfp4``. Matrices of experts stand one after the other, each the transpose of what
the model has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.checkpoint.codecs.base import Codec, Planes

BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Mxfp4(Codec):
    """*experts* matrices; in every byte the first of two neighbours in the lower half."""

    experts: int
    name: str = "mxfp4"

    transposes = True

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, and exponents."""
        blocks = self.experts, rows // self.experts, columns // BLOCK
        return {"weight": (*blocks, BLOCK // 2), "scale": blocks}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Powers of two round nothing."""
        codes = planes["weight"].reshape(-1).to(torch.int32)
        values = _pairs(codes.device).index_select(0, codes).view(torch.float32).view(-1, BLOCK)
        exponents = planes["scale"].reshape(-1, 1).to(torch.int32) - 127
        out.copy_(torch.ldexp(values, exponents, out=values).view(out.shape))


def _pairs(device: torch.device) -> torch.Tensor:
    """``(256,)``: for each byte its two values in fp32, seen as one integer of 64 bits."""
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=device)
    codes = torch.arange(256, device=device)
    return torch.stack([table[codes & 15], table[codes >> 4]], dim=1).contiguous().view(torch.int64).view(-1)

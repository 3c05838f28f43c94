"""MXFP4 as gpt-oss has it: 4-bit floats (e2m1), 32 neighbours share a power of two.

Formula: ``transformers.integrations.mxfp4``. Matrices of experts stand one after the other, each the transpose of what
the model has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.checkpoint.codecs.base import Codec, Planes, pair_table, stored_as

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


@dataclass(frozen=True)
class Mxfp4(Codec):
    """*experts* matrices; in every byte the first of two neighbours in the lower half."""

    experts: int
    name: str = "mxfp4"

    transposes = True
    dtypes = stored_as(weight="U8", scale="U8 F8_E8M0")

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, and exponents."""
        blocks = self.experts, rows // self.experts, columns // BLOCK
        return {"weight": (*blocks, BLOCK // 2), "scale": blocks}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Powers of two round nothing."""
        codes = planes["weight"].reshape(-1).to(torch.int32)
        values = pair_table(VALUES, 0).to(codes.device).index_select(0, codes).view(torch.float32).view(-1, BLOCK)
        exponents = planes["scale"].reshape(-1, 1).to(torch.int32) - 127
        out.copy_(torch.ldexp(values, exponents, out=values).view(out.shape))

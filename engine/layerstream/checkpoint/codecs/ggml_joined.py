"""Parameters that llama.cpp's converter took apart, put together as they are decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.checkpoint.codecs.base import Codec, Planes
from layerstream.checkpoint.codecs.ggml import Ggml


@dataclass(frozen=True)
class ByTurns(Codec):
    """fp32 vectors, one in each row: two halves one after the other, whose values the model has by turns."""

    name: str = "F32"

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Bytes of numbers."""
        return {"weight": (rows, 4 * columns)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Nothing is rounded but to *out*."""
        halves = planes["weight"].view(torch.float32).view(len(out), 2, -1)
        out.copy_(halves.transpose(1, 2).reshape(out.shape))


@dataclass(frozen=True)
class LatentUp(Codec):
    """What makes keys and values of latents, head by head: *key_rows* of keys, then *value_rows* of values.

    The file has the keys' part of each head transposed, for attention over latents themselves.
    """

    keys: Ggml
    values: Ggml
    key_rows: int
    value_rows: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of the larger part of the formats that are named so."""
        return self.values.name

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Heads are not cut."""
        return self.key_rows + self.value_rows

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Those of both."""
        heads = rows // self.row_step
        return {
            "keys": self.keys.expected(heads * columns, self.key_rows)["weight"],
            "values": self.values.expected(heads * self.value_rows, columns)["weight"],
        }

    def stacked(self, count: int) -> Codec | None:
        """No model has several of them in one parameter."""
        return None

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Each part by its own codec."""
        columns = out.shape[1]
        heads = out.view(-1, self.row_step, columns)
        keys = torch.empty((len(heads) * columns, self.key_rows), dtype=out.dtype, device=out.device)
        self.keys.decode({"weight": planes["keys"]}, 0, keys)
        heads[:, : self.key_rows] = keys.view(len(heads), columns, self.key_rows).transpose(1, 2)
        values = torch.empty((len(heads) * self.value_rows, columns), dtype=out.dtype, device=out.device)
        self.values.decode({"weight": planes["values"]}, 0, values)
        heads[:, self.key_rows :] = values.view(len(heads), self.value_rows, columns)

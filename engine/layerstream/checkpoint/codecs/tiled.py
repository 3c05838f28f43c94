"""4-bit integers as torch's product kernel for CPUs reads them: the format of ``quantization="int4"``.

Rows stand in tiles of 64. A tile is ``(columns, 32)`` bytes; byte ``[k, r]`` has the code of row *r* in its lower half
and that of row *r + 32* in its upper one. A value is ``(code - 8) * scale + offset``, in fp32; *group* neighbours of a
row share scale and offset, which are stored side by side in bfloat16. ``aten._weight_int4pack_mm_for_cpu`` takes the
codes as they lie where vectors have 512 bits, and it gives a row the same bits whatever the others are.

Other formats are linear in a 4-bit code too. A matrix of theirs that stays in memory is rewritten into this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from layerstream.checkpoint.codecs.base import Codec, Planes, in_dtype, nibbles, stored_as

TILED_METHOD = "layerstream-int4"  # the quant_method of such a checkpoint
TILE = 64
GROUPS = (32, 64, 128, 256)
CACHED_VALUES = 2**18  # decoded at a time: what they are computed from stays in the processor's cache
SLAB_VALUES = 2**22  # of a matrix, rewritten at a time


@dataclass(frozen=True)
class TiledInt4(Codec):
    """Asymmetric 4-bit integers. Scales and offsets are ``(tiles, groups, 64, 2)`` as they are stored, and
    ``(groups, rows, 2)``, as the kernel has them, where they stay in memory."""

    group: int
    name: str = "int4"

    is_centred = True  # offsets are what code 8 stands for
    kernel = "int4"
    work_bytes = 2
    columns_first = True
    row_step = TILE
    dtypes = stored_as(weight="U8")

    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Codes, and scales with offsets."""
        tiles = -(-rows // TILE)
        return {"weight": (tiles, columns, TILE // 2), "scale": (tiles, columns // self.group, TILE, 2)}

    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """In fp32, rounded once; fastest where *out* is the transpose of a contiguous matrix."""
        tiles, columns, _ = planes["weight"].shape
        if not out.is_cpu:
            self._decode_at_once(planes, out)
            return
        step = max(1, CACHED_VALUES // (columns * TILE))
        for start in range(0, tiles, step):
            rows = slice(start * TILE, min((start + step) * TILE, len(out)))
            self._decode(self.cut(planes, tiles * TILE, rows.start, rows.stop), out[rows])

    def _decode(self, planes: Planes, out: torch.Tensor) -> None:
        codes, stored = planes["weight"], planes["scale"]
        tiles, columns, half = codes.shape
        grouped = codes.view(tiles, columns // self.group, self.group, half)
        values = torch.empty((*grouped.shape[:-1], 2, half), device=codes.device)
        values[..., 0, :] = torch.bitwise_and(grouped, 15)
        values[..., 1, :] = torch.bitwise_right_shift(grouped, 4)
        by_tile = stored if stored.dim() == 4 else stored.unflatten(1, (tiles, TILE)).transpose(0, 1)
        scale, lowest = (part[:, :, None].contiguous() for part in self.lines(by_tile))
        values = torch.addcmul(lowest, values.flatten(-2), scale).view(tiles, columns, TILE)
        if out.shape[0] == tiles * TILE:
            out.T.unflatten(1, (tiles, TILE)).transpose(0, 1).copy_(values)
        else:
            out.copy_(values.transpose(1, 2).reshape(-1, columns)[: out.shape[0]])

    def _decode_at_once(self, planes: Planes, out: torch.Tensor) -> None:
        """By few operators, for an accelerator."""
        codes, stored = planes["weight"], planes["scale"]
        tiles, columns, half = codes.shape
        rows = tiles * TILE
        whole = out if len(out) == rows else out.new_empty((columns, rows)).T
        values = whole.T.view(columns // self.group, self.group, tiles, 2, half).permute(2, 0, 1, 3, 4)
        halves = nibbles(codes, 2, less_eight=self.is_centred).view(values.shape)
        by_tile = stored if stored.dim() == 4 else stored.unflatten(1, (tiles, TILE)).transpose(0, 1)
        parts = [part.unflatten(2, (1, 2, half)) for part in in_dtype(by_tile, out.dtype).unbind(-1)]
        if len(parts) == 1:
            torch.mul(halves, parts[0], out=values)
        else:
            torch.addcmul(parts[1], halves, parts[0], out=values)
        if whole is not out:
            out.copy_(whole[: len(out)])

    def lines(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a step of codes is worth, and what code 0 stands for, in fp32, of scales as they are *stored*."""
        scale, offset = stored.to(torch.float32).unbind(-1)
        return scale, offset - 8 * scale

    def pairs(self, stored: torch.Tensor) -> torch.Tensor:
        """Of scales as they are *stored* those that the kernel takes, ``(tiles, groups, 64, 2)`` in bfloat16."""
        return stored

    def product(self, planes: Planes, inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
        """By torch's kernel, with products and sums in fp32."""
        codes, scale = planes["weight"], planes["scale"]
        columns = codes.shape[1]
        if scale.dim() == 4:
            scale = by_kernel(self.pairs(scale))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, codes.view(-1, columns // 2), self.group, scale)

    def cut(self, planes: Planes, num_rows: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Whole tiles."""
        tiles = slice(start // TILE, -(-stop // TILE))
        scale = planes["scale"]
        rows = slice(tiles.start * TILE, tiles.stop * TILE)
        return {"weight": planes["weight"][tiles], "scale": scale[tiles] if scale.dim() == 4 else scale[:, rows]}


def by_kernel(scale: torch.Tensor) -> torch.Tensor:
    """``(tiles, groups, 64, 2)`` to ``(groups, rows, 2)``."""
    return scale.transpose(0, 1).flatten(1, 2).contiguous()


def tile_codes(codes: torch.Tensor) -> torch.Tensor:
    """``(rows, columns)`` in 0…15, rows a multiple of 64, to ``(tiles, columns, 32)``."""
    low, high = codes.to(torch.uint8).view(-1, 2, TILE // 2, codes.shape[1]).unbind(1)
    return (low | (high << 4)).transpose(1, 2).contiguous()


def tile_scales(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Two times ``(rows, groups)``, rows a multiple of 64, to ``(tiles, groups, 64, 2)`` in bfloat16."""
    both = torch.stack([scale, offset], dim=-1).to(torch.bfloat16)
    return both.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def tiled(codec: Codec, columns: int) -> TiledInt4 | None:
    """What a matrix of *codec* can be rewritten to; ``None``: it cannot be."""
    if isinstance(codec, TiledInt4):
        return TiledInt4(codec.group)
    group = codec.affine_group(columns)
    return TiledInt4(group) if group in GROUPS and columns % group == 0 else None


def tiled_bytes(target: TiledInt4, rows: int, columns: int) -> int:
    """Bytes of a matrix in that form."""
    shapes = target.expected(rows, columns)
    return math.prod(shapes["weight"]) + 2 * math.prod(shapes["scale"])


def staying_shapes(target: TiledInt4, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of the planes of a matrix that stays, as *target* has it."""
    tiles = -(-rows // TILE)
    return {
        "weight": (torch.uint8, (tiles, columns, TILE // 2)),
        "scale": (torch.bfloat16, (columns // target.group, tiles * TILE, 2)),
    }


def rewrite(codec: Codec, planes: Planes, out: Planes, rows: int, columns: int) -> None:
    """Write a matrix ``(rows, columns)``, stored as *planes*, to *out*, planes as :func:`staying_shapes` has them."""
    if isinstance(codec, TiledInt4):
        out["weight"].copy_(planes["weight"])
        out["scale"].copy_(by_kernel(codec.pairs(planes["scale"])))
        return
    step = math.lcm(TILE, codec.row_step) if codec.row_step else rows
    slab = max(step, SLAB_VALUES // columns // step * step)
    for start in range(0, rows, slab):
        stop = min(start + slab, rows)
        part = codec.cut(planes, rows, start, stop) if codec.row_step else planes
        missing = -(stop - start) % TILE
        padded = [torch.nn.functional.pad(plane, (0, 0, 0, missing)) for plane in codec.affine(part, stop - start)]
        out["weight"][start // TILE : -(-stop // TILE)] = tile_codes(padded[0])
        out["scale"][:, start : stop + missing] = by_kernel(tile_scales(padded[1], padded[2]))

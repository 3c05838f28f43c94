"""A GGUF file as a folder: what Q4_0 and Q4_1 have goes into tiles, other blocks stay blocks; no value changes.

What llama.cpp's converter did to the order of rows is undone on the way. Plain numbers that have to be computed (norms
with an offset) are written in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerstream.checkpoint.codecs.ggml import Ggml
from layerstream.checkpoint.codecs.tiled import TILED_METHOD
from layerstream.checkpoint.codecs.tiled_ggml import can_be_tiled, tile_blocks, tiled_ggml
from layerstream.checkpoint.names import PackedSource, ParameterSource, Source
from layerstream.checkpoint.pieces import PiecedTensor
from layerstream.checkpoint.writer import dtype_name
from layerstream.errors import UnsupportedFormat
from layerstream.model.skeleton import Skeleton
from layerstream.setup.pack_items import (
    COPY_BYTES,
    PART_BYTES,
    Item,
    Packed,
    Parts,
    Plain,
    checked_rows,
    decode_first,
    linear_keys,
    node_of,
    read_parts,
    wrong_length,
)
from layerstream.text.tokenizer import load_tokenizer

QUANTISATION = {"quant_method": TILED_METHOD, "bits": 4, "modules_to_not_convert": []}


@dataclass(frozen=True, slots=True)
class Numbers:
    """A parameter that is stored as plain numbers, as it is."""

    source: ParameterSource

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.source.name

    @property
    def planes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Itself."""
        return {self.name: (dtype_name(self.source.dtype), self.source.shape)}

    def parts(self) -> Iterator[tuple[str, Parts]]:
        """A piece at a time."""
        size = self.source.num_bytes
        yield self.name, (_read(self.source, at, min(at + COPY_BYTES, size)) for at in range(0, size, COPY_BYTES))

    def problem(self, plain: Plain, packed: Packed) -> str | None:
        """Its length."""
        return wrong_length(plain[self.name], self.source.num_bytes)


@dataclass(frozen=True, slots=True)
class Computed:
    """A small parameter whose values have to be computed."""

    source: PackedSource

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.source.name

    @property
    def planes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """In fp32."""
        return {self.name: ("F32", self.source.shape)}

    def parts(self) -> Iterator[tuple[str, Parts]]:
        """At once."""
        values = torch.empty(self.source.matrix_shape)
        planes = {name: _tensor(plane, 0, plane.num_bytes) for name, plane in self.source.planes.items()}
        self.source.codec.decode(planes, 0, values)
        yield self.name, [values]

    def problem(self, plain: Plain, packed: Packed) -> str | None:
        """Its length."""
        same = plain[self.name].extent.num_bytes == 4 * math.prod(self.source.shape)
        return None if same else "has not the length of the source"


@dataclass(frozen=True, slots=True)
class Blocks:
    """A parameter of rows, in the model's order: in tiles, or as GGUF has them."""

    source: PackedSource
    codec: Ggml
    is_tiled: bool

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.source.name

    @property
    def planes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Codes and scales, or blocks, or numbers."""
        if self.is_tiled:
            shapes = tiled_ggml(self.codec).expected(*self.source.matrix_shape)
            return {f"{self.name}_tiles": ("U8", shapes["weight"]), f"{self.name}_scale": ("F16", shapes["scale"])}
        if not self.codec.is_quantised:
            return {self.name: (self.codec.name, self.source.shape)}
        row_bytes = self.source.planes["weight"].num_bytes // math.prod(self.source.shape[:-1])
        return {f"{self.name}_blocks_{self.codec.name}": ("U8", (*self.source.shape[:-1], row_bytes))}

    def parts(self) -> Iterator[tuple[str, Parts]]:
        """Part by part; of tiles the scales, which are few, are kept until the codes are written."""
        if not self.is_tiled:
            (name,) = self.planes
            yield name, (self.codec.blocks(planes, rows) for planes, rows in self._rows(1))
            return
        scales: list[torch.Tensor] = []

        def codes() -> Iterator[torch.Tensor]:
            for planes, rows in self._rows(tiled_ggml(self.codec).row_step):
                tiles, found = tile_blocks(self.codec, planes, rows)
                scales.append(found)
                yield tiles

        yield f"{self.name}_tiles", codes()
        yield f"{self.name}_scale", scales

    def problem(self, plain: Plain, packed: Packed) -> str | None:
        """Its first rows have the values that the source has, every one."""
        if self.name in plain:
            return wrong_length(plain[self.name], self.source.num_bytes)
        matrix = packed[self.name]
        found = decode_first(matrix, checked_rows(matrix))
        planes, rows = next(self._rows(math.lcm(len(found), self.codec.row_step)))
        wanted = torch.empty(rows, found.shape[1])
        self.codec.decode(planes, 0, wanted)
        return None if torch.equal(found, wanted[: len(found)]) else "has not the values of the source"

    def _rows(self, step: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Planes of some rows, and of how many."""
        plane = self.source.planes["weight"]
        rows = self.source.matrix_shape[0]
        row_bytes = plane.num_bytes // rows
        step = math.lcm(step, self.codec.row_step)
        count = max(step, PART_BYTES // row_bytes // step * step)
        for start in range(0, rows, count):
            stop = min(start + count, rows)
            yield {"weight": _tensor(plane, start * row_bytes, stop * row_bytes)}, stop - start


def gguf_shards(skeleton: Skeleton) -> list[list[Item]]:
    """The parameters, layer by layer; tied ones once.

    Raises:
        UnsupportedFormat: experts that the file has transposed.
    """
    linears = linear_keys(skeleton, keep_head=False)
    groups: dict[str, list[Item]] = {}
    seen: set[int] = set()
    for key, source in skeleton.sources.items():
        if id(source) not in seen:
            seen.add(id(source))
            groups.setdefault(node_of(skeleton, key), []).append(_item(source, key in linears))
    return list(groups.values())


def write_side_files(source: Path, target: Path, skeleton: Skeleton) -> dict[str, Any]:
    """Put the tokenizer of the file *source* beside the weights; the config that goes there."""
    with suppress(UnsupportedFormat):  # there is none in some files: whoever opens the folder is told
        load_tokenizer(source).save_pretrained(target)
    dtype = str(skeleton.dtype).removeprefix("torch.")
    return skeleton.config.to_dict() | {"dtype": dtype}


def _item(source: Source, is_linear: bool) -> Item:
    if isinstance(source, ParameterSource):
        return Numbers(source)
    codec = source.codec
    if not isinstance(codec, Ggml) or codec.offset:
        return Computed(source)
    if codec.transposes:
        raise UnsupportedFormat(
            f"{source.name!r} has experts that this file stores transposed, which no folder can say; run the file as "
            "it is"
        )
    return Blocks(source, codec, is_linear and can_be_tiled(codec, *source.matrix_shape))


def _read(source: ParameterSource, start: int, stop: int) -> bytes:
    """Bytes ``[start, stop)`` of what *source* is made of."""
    whole = PiecedTensor(source.shape, source.dtype.itemsize, source.pieces)
    found = bytearray(stop - start)
    for piece in whole.window(start, stop, 0):
        (raw,) = read_parts(piece.entry, [(piece.source_offset, piece.num_bytes)])
        found[piece.destination_offset : piece.destination_offset + piece.num_bytes] = raw
    return bytes(found)


def _tensor(plane: ParameterSource, start: int, stop: int) -> torch.Tensor:
    """The same as bytes to compute with; rows of them, where the plane has rows."""
    raw = torch.frombuffer(bytearray(_read(plane, start, stop)), dtype=torch.uint8)
    return raw.view(-1, plane.shape[-1]) if len(plane.shape) > 1 else raw

"""The other way round: from a matrix to the planes that stand for it, a part of its rows at a time.

nf4 and int8 come out as bitsandbytes makes them, bit for bit, so that plain transformers loads them. int4 comes out as
torch's product kernel reads it, with scales and offsets searched for the least squared error in each group.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch

from layerstream.checkpoint.codecs.base import Codec
from layerstream.checkpoint.codecs.bnb import Bnb4, BnbInt8
from layerstream.checkpoint.codecs.bnb_kernel import import_bitsandbytes
from layerstream.checkpoint.codecs.tiled import TILE, TILED_METHOD, TiledInt4, tile_codes, tile_scales
from layerstream.core.formats import FORMATS, Format
from layerstream.errors import ConfigurationError, MissingExtra

BLOCK = 64
NESTED_BLOCK = 256
GROUPS = (128, 64)
SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75)  # of a group's range, tried out
Written = tuple[str, torch.dtype, tuple[int, ...]]
Rows = Iterable[torch.Tensor]
Planes = Iterator[tuple[str, Iterable[torch.Tensor]]]


class Encoder(ABC):
    """Quantises matrices one way. *row_step*: parts of a matrix have a multiple of so many rows, but for the last."""

    format: Format
    row_step: int = 1

    @abstractmethod
    def can(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape can be stored this way; it stays as it is if not."""

    @abstractmethod
    def planes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Written]:
        """Name, dtype and shape of what parameter *name*, of *shape* and *dtype*, becomes; in the order of
        :meth:`encode`. Where the format packs experts, *shape* may be ``(experts, rows, columns)``."""

    @abstractmethod
    def encode(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Rows) -> Planes:
        """The planes of a matrix that comes in *parts*, experts one below the other, each as it may be written."""

    @abstractmethod
    def config(self, skipped: list[str]) -> dict[str, Any]:
        """The ``quantization_config``; modules of the names *skipped* are as they were."""

    @staticmethod
    @abstractmethod
    def sample(size: int) -> tuple[Codec, dict[str, torch.Tensor]]:
        """A random matrix ``(size, size)`` as it would be stored, to measure with; nothing need be installed for it."""


def make_encoder(kind: str) -> Encoder:
    """The encoder for ``"nf4"``, ``"int8"`` or ``"int4"``.

    Raises:
        ConfigurationError: another kind. MissingExtra: bitsandbytes is wanted and not installed.
    """
    if kind not in ENCODERS:
        raise ConfigurationError(f"quantization is {kind!r}; expected one of {', '.join(map(repr, ENCODERS))}")
    return ENCODERS[kind]()


def _bitsandbytes() -> Any:
    try:
        return import_bitsandbytes()
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "quant") from error


class Nf4(Encoder):
    """bitsandbytes' nf4 with double quantisation: 4.13 bits a weight."""

    format = FORMATS["nf4"]
    row_step = BLOCK  # whatever the number of columns is, these are whole blocks

    def __init__(self) -> None:
        self._functional = _bitsandbytes().functional

    def can(self, rows: int, columns: int) -> bool:
        """Whole blocks in every row: bitsandbytes' kernels want that."""
        return columns % BLOCK == 0

    def planes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Written]:
        """Codes, then scales and their scales, then tables and the state."""
        values = prod(shape)
        blocks = values // BLOCK
        state = self._state(shape, dtype, 0.0)
        return [
            (name, torch.uint8, (values // 2, 1)),
            (f"{name}.absmax", torch.uint8, (blocks,)),
            (f"{name}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
            (f"{name}.nested_quant_map", torch.float32, (256,)),
            (f"{name}.quant_map", torch.float32, (16,)),
            (f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (len(state),)),
        ]

    def encode(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Rows) -> Planes:
        """As ``bitsandbytes.functional.quantize_4bit`` with ``compress_statistics``, part by part."""
        absmax = torch.empty(prod(shape) // BLOCK)  # in one piece: small pieces between large ones fragment the heap
        tables: list[torch.Tensor] = []

        def codes() -> Iterator[torch.Tensor]:
            done = 0
            for part in parts:
                data, state = self._functional.quantize_4bit(
                    part, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
                )
                absmax[done : done + len(state.absmax)] = state.absmax
                done += len(state.absmax)
                tables[:] = [state.code]
                yield data

        yield name, codes()
        offset = absmax.mean()
        nested, state = self._functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        yield f"{name}.absmax", [nested]
        yield f"{name}.nested_absmax", [state.absmax]
        yield f"{name}.nested_quant_map", [state.code]
        yield f"{name}.quant_map", tables
        raw = self._state(shape, dtype, offset.item())
        yield f"{name}.quant_state.bitsandbytes__nf4", [torch.frombuffer(bytearray(raw), dtype=torch.uint8)]

    def _state(self, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> bytes:
        """bitsandbytes' JSON, in a length that does not depend on the offset."""
        state = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": 0.0,
        }
        return json.dumps(state).replace('"nested_offset": 0.0', f'"nested_offset": {offset:<24.17g}').encode()

    def config(self, skipped: list[str]) -> dict[str, Any]:
        """A BitsAndBytesConfig, as transformers writes it."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }

    @staticmethod
    def sample(size: int) -> tuple[Codec, dict[str, torch.Tensor]]:
        """Without double quantisation."""
        codes = torch.randint(0, 256, (size * size // 2, 1), dtype=torch.uint8)
        planes = {"weight": codes, "absmax": torch.ones(size * size // BLOCK), "quant_map": torch.linspace(-1, 1, 16)}
        return Bnb4("nf4", size), planes


class Int8(Encoder):
    """bitsandbytes' int8 by rows: 8 bits a weight."""

    format = FORMATS["int8"]

    def __init__(self) -> None:
        self._functional = _bitsandbytes().functional

    def can(self, rows: int, columns: int) -> bool:
        """Any."""
        return True

    def planes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Written]:
        """Values, scales, and the format's number."""
        stem = name.removesuffix("weight")
        return [
            (name, torch.int8, shape),
            (f"{stem}SCB", torch.float32, shape[:1]),
            (f"{stem}weight_format", torch.uint8, ()),
        ]

    def encode(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Rows) -> Planes:
        """As ``bitsandbytes.functional.int8_vectorwise_quant`` of the matrix in float16."""
        scales = torch.empty(shape[0])

        def values() -> Iterator[torch.Tensor]:
            done = 0
            for part in parts:
                data, largest, _ = self._functional.int8_vectorwise_quant(part.to(torch.float16))
                scales[done : done + len(part)] = largest
                done += len(part)
                yield data

        stem = name.removesuffix("weight")
        yield name, values()
        yield f"{stem}SCB", [scales]
        yield f"{stem}weight_format", [torch.zeros((), dtype=torch.uint8)]

    def config(self, skipped: list[str]) -> dict[str, Any]:
        """A BitsAndBytesConfig, as transformers writes it."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": skipped,
        }

    @staticmethod
    def sample(size: int) -> tuple[Codec, dict[str, torch.Tensor]]:
        """All values."""
        random = torch.Generator().manual_seed(2)
        values = torch.randint(-127, 128, (size, size), dtype=torch.int8, generator=random)
        return BnbInt8(), {"weight": values, "SCB": torch.rand(size, generator=random)}


class Int4(Encoder):
    """4-bit integers in the tiles that torch's product kernel reads, in groups of 128, or of 64 where that does not
    divide the columns: 4.25 bits a weight, or 4.5."""

    format = FORMATS["int4"]
    row_step = TILE

    def can(self, rows: int, columns: int) -> bool:
        """Whole groups, and whole tiles."""
        return columns % min(GROUPS) == 0 and rows % TILE == 0

    def planes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Written]:
        """Codes, and scales with offsets."""
        *experts, rows, columns = shape
        shapes = _tiled(columns).expected(rows, columns)
        return [
            (f"{name}_tiles", torch.uint8, (*experts, *shapes["weight"])),
            (f"{name}_scale", torch.bfloat16, (*experts, *shapes["scale"])),
        ]

    def encode(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Rows) -> Planes:
        """Group by group, with the range that gives the least squared error."""
        target = _tiled(shape[-1])
        scales = torch.empty(target.expected(prod(shape[:-1]), shape[-1])["scale"], dtype=torch.bfloat16)

        def tiles() -> Iterator[torch.Tensor]:
            done = 0
            for part in parts:
                codes, scale, offset = quantise_groups(part.to(torch.float32), target.group)
                found = tile_scales(scale, offset)
                scales[done : done + len(found)] = found
                done += len(found)
                yield tile_codes(codes)

        yield f"{name}_tiles", tiles()
        yield f"{name}_scale", [scales]

    def config(self, skipped: list[str]) -> dict[str, Any]:
        """Of a method that is this project's."""
        return {"quant_method": TILED_METHOD, "bits": 4, "modules_to_not_convert": skipped}

    @staticmethod
    def sample(size: int) -> tuple[Codec, dict[str, torch.Tensor]]:
        """All codes, in the larger groups."""
        random = torch.Generator().manual_seed(1)
        codes = torch.randint(0, 16, (size, size), dtype=torch.uint8, generator=random)
        scale = torch.rand((size, size // max(GROUPS)), generator=random)
        return TiledInt4(max(GROUPS)), {"weight": tile_codes(codes), "scale": tile_scales(scale, scale - 0.5)}


def _tiled(columns: int) -> TiledInt4:
    return TiledInt4(next(group for group in GROUPS if columns % group == 0))


def quantise_groups(matrix: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``(rows, columns)`` in 0…15, scales and offsets in bfloat16 ``(rows, groups)`` of a matrix in fp32: a value
    is ``(code - 8) * scale + offset``."""
    parts = matrix.unflatten(1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    least = torch.full_like(low, float("inf"))
    for shrink in SHRINKS:
        scale = ((high - low) * shrink / 15).clamp(min=1e-8).to(torch.bfloat16)
        half = torch.where(high > low, scale.float() / 2, 0.0)  # code 8 stands half a step above the middle
        offset = ((high + low) / 2 + half).to(torch.bfloat16)
        codes = (parts - offset.float()).div_(scale.float()).round_().add_(8).clamp_(0, 15)
        error = ((codes - 8) * scale.float() + offset.float() - parts).square_().sum(-1, keepdim=True)
        if best is None:
            best, least = (codes, scale, offset), error
            continue
        better = error < least
        best = (
            torch.where(better, codes, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, offset, best[2]),
        )
        least = torch.where(better, error, least)
    assert best is not None
    return best[0].flatten(1), best[1].squeeze(-1), best[2].squeeze(-1)


ENCODERS: dict[str, type[Encoder]] = {made.format.name: made for made in (Nf4, Int8, Int4)}

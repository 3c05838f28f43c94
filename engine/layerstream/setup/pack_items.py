"""What packing writes of each stored tensor: as it is, or quantised a part of its rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeAlias

import torch

from layerstream.checkpoint.codecs.encode import Encoder
from layerstream.checkpoint.header import TensorEntry
from layerstream.checkpoint.names import PLANE_DTYPES, ParameterSource
from layerstream.checkpoint.packed import PackedTensor
from layerstream.checkpoint.writer import dtype_name
from layerstream.errors import LayerStreamError, ReadError, TruncatedFile
from layerstream.model.module_sizes import is_fused_experts, is_plain_linear
from layerstream.model.skeleton import Skeleton

PART_BYTES = 8 * 2**20  # of a matrix, worked on at a time
COPY_BYTES = 16 * 2**20
CHECKED_ROWS = 64
Parts: TypeAlias = Iterable[torch.Tensor | bytes]
Plain: TypeAlias = Mapping[str, TensorEntry]
Packed: TypeAlias = Mapping[str, PackedTensor]


class Item(Protocol):
    """One tensor of the source, and what becomes of it."""

    @property
    def name(self) -> str:
        """Of the parameter, or of the stored tensor."""
        ...

    @property
    def planes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Dtype name and shape of what is written, by its name there."""
        ...

    def parts(self) -> Iterator[tuple[str, Parts]]:
        """The same with the bytes, in that order."""
        ...

    def problem(self, plain: Plain, packed: Packed) -> str | None:
        """What is wrong with what was written, found to be *plain* and *packed*."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """A stored tensor as it is."""

    entry: TensorEntry

    @property
    def name(self) -> str:
        """As stored."""
        return self.entry.name

    @property
    def planes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Itself."""
        return {self.entry.name: (self.entry.dtype, self.entry.shape)}

    def parts(self) -> Iterator[tuple[str, Parts]]:
        """A piece at a time."""
        size = self.entry.extent.num_bytes
        pieces = ((start, min(COPY_BYTES, size - start)) for start in range(0, size, COPY_BYTES))
        yield self.name, read_parts(self.entry, pieces)

    def problem(self, plain: Plain, packed: Packed) -> str | None:
        """Its length."""
        return wrong_length(plain[self.name], self.entry.extent.num_bytes)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A stored matrix, quantised; of all experts, ``(experts, rows, columns)``, those one below the other."""

    entry: TensorEntry
    dtype: torch.dtype
    encoder: Encoder

    @property
    def name(self) -> str:
        """As stored."""
        return self.entry.name

    @property
    def planes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As the encoder says."""
        made = self.encoder.planes(self.name, self.entry.shape, self.dtype)
        return {name: (dtype_name(dtype), shape) for name, dtype, shape in made}

    def parts(self) -> Iterator[tuple[str, Parts]]:
        """Part by part."""
        yield from self.encoder.encode(self.name, self.entry.shape, self.dtype, self._rows(self.encoder.row_step))

    def problem(self, plain: Plain, packed: Packed) -> str | None:
        """Its first rows are those of the source, to within rounding."""
        found = decode_first(packed[self.name], checked_rows(packed[self.name]))
        wanted = next(self._rows(len(found)))[: len(found)].to(torch.float32)
        error = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-12))
        most = self.encoder.format.most_error
        return None if error <= most else f"differs from the source by {error:.2f} of its size"

    def _rows(self, step: int) -> Iterator[torch.Tensor]:
        """A part at a time."""
        rows, columns = prod(self.entry.shape[:-1]), self.entry.shape[-1]
        row_bytes = columns * self.dtype.itemsize
        count = max(step, PART_BYTES // row_bytes // step * step)
        parts = ((start * row_bytes, min(count, rows - start) * row_bytes) for start in range(0, rows, count))
        for raw in read_parts(self.entry, parts):
            yield torch.frombuffer(bytearray(raw), dtype=self.dtype).view(-1, columns)


def folder_shards(skeleton: Skeleton, encoder: Encoder, keep_head: bool) -> list[list[Item]]:
    """The stored tensors, layer by layer; what belongs to no layer comes first and last."""
    whole = linear_keys(skeleton, keep_head)
    if encoder.format.packs_experts:
        whole |= fused_keys(skeleton.model)
    groups: dict[str, list[Item]] = {}
    seen: set[str] = set()
    for key, found in skeleton.sources.items():
        assert isinstance(found, ParameterSource)
        for piece in found.pieces:
            entry = piece.entry
            can = len(entry.shape) > 1 and encoder.can(*entry.shape[-2:])
            is_single = key in whole and found.is_single and entry.shape == found.shape
            is_whole = piece.num_bytes == entry.extent.num_bytes
            is_expert = encoder.format.packs_experts and (len(entry.shape), len(found.shape)) == (2, 3) and is_whole
            if entry.name not in seen:
                is_packed = can and (is_single or is_expert)
                item = Encoded(entry, found.dtype, encoder) if is_packed else Copied(entry)
                groups.setdefault(node_of(skeleton, key), []).append(item)
                seen.add(entry.name)
    return list(groups.values())


def linear_keys(skeleton: Skeleton, keep_head: bool) -> set[str]:
    """State dict names of the matrices that may be packed."""
    linears = {
        f"{path}.weight"
        for path, module in skeleton.model.named_modules()
        if is_plain_linear(module) and not (keep_head and path == skeleton.head.name)
    }
    return linears - {skeleton.head_key} if skeleton.is_tied else linears


def fused_keys(model: torch.nn.Module) -> set[str]:
    """State dict names of the matrices of all experts of a block, ``(experts, rows, columns)``."""
    modules = ((path, module) for path, module in model.named_modules() if is_fused_experts(module))
    return {
        f"{path}.{name}"
        for path, module in modules
        if not getattr(module, "is_transposed", False)
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    }


def node_of(skeleton: Skeleton, key: str) -> str:
    """Which layer has *key*; itself, if none has."""
    return next((node.name for node in skeleton.body if key.startswith(f"{node.name}.")), key)


def skipped_linears(skeleton: Skeleton, shards: Sequence[Sequence[Item]]) -> list[str]:
    """Linears that were left as they are, as transformers names them."""
    packed = {item.name for items in shards for item in items if isinstance(item, Encoded)}
    linears = [path for path, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [
        path
        for path in linears
        if not any(piece.entry.name in packed for piece in skeleton.sources[f"{path}.weight"].pieces)
    ]


def wrong_length(written: TensorEntry, num_bytes: int) -> str | None:
    """What is wrong with a tensor that was *written* as it is, of *num_bytes*."""
    return None if written.extent.num_bytes == num_bytes else "has not the bytes of the source"


def checked_rows(matrix: PackedTensor) -> int:
    """How many along the first axis of *matrix* are compared: an expert, or whole rows of the codec's."""
    codec, shape = matrix.codec, list(matrix.shape)
    if len(shape) > 2:
        return 1
    step = codec.row_step or shape[0]
    return min(shape[0], -(-CHECKED_ROWS // step) * step)


def decode_first(matrix: PackedTensor, count: int) -> torch.Tensor:
    """The first *count* along the first axis of a matrix that was written, in fp32."""
    rows = matrix.shape[0]
    planes = {}
    for name, entry in matrix.planes.items():
        whole = name in matrix.codec.whole
        size = entry.extent.num_bytes if whole else entry.extent.num_bytes * count // rows
        with entry.extent.path.open("rb") as file:
            raw = bytearray(os.pread(file.fileno(), size, entry.extent.offset))
        planes[name] = torch.frombuffer(raw, dtype=PLANE_DTYPES[entry.dtype])
        if not whole and len(entry.shape) > 1:
            planes[name] = planes[name].view(-1, *entry.shape[1:])
    found = torch.empty(count, *matrix.shape[1:]).flatten(0, -2)
    matrix.codec.decode(planes, 0, found)
    return found


def read_parts(entry: TensorEntry, parts: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Of a stored tensor, *parts* of so many bytes from there on.

    Raises:
        ReadError, TruncatedFile: the disk fails, or the file is shorter than it was.
    """
    extent = entry.extent
    try:
        with extent.path.open("rb") as file:
            for start, num_bytes in parts:
                raw = os.pread(file.fileno(), num_bytes, extent.offset + start)
                if len(raw) < num_bytes:
                    raise TruncatedFile(f"{extent.path}: ends within {entry.name!r}; fetch it again")
                yield raw
            _forget(file.fileno())
    except OSError as error:
        if isinstance(error, LayerStreamError) or error.filename not in {None, str(extent.path)}:
            raise
        raise ReadError(f"{extent.path}: cannot be read ({error.strerror}); look at the disk") from error


def _forget(descriptor: int) -> None:
    """Let the page cache go of a file that was read once."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

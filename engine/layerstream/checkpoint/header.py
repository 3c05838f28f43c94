"""Reads safetensors headers, which are hostile input until proven otherwise.

The format: 8 bytes little-endian length n, n bytes of JSON, then the data. Every claim is checked against the file
before a byte of data is read: length, JSON, names, dtypes, shapes, extents inside the file and not overlapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from layerstream.checkpoint.reading import MAX_JSON_BYTES, check_file, parse_object
from layerstream.errors import InvalidHeader, TruncatedFile

MAX_HEADER_BYTES = MAX_JSON_BYTES
MAX_TENSOR_VALUES = 2**48
MAX_DIMENSIONS = 16
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes ``[offset, offset + num_bytes)`` of a file."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored tensor; *dtype* is the format's name (``"BF16"``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent


def stored_bytes(dtype: str, shape: tuple[int, ...] | list[int]) -> int:
    """Bytes that a tensor of the format's *dtype* takes."""
    return -(-prod(shape) * DTYPE_BITS[dtype] // 8)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name.

    Raises:
        InvalidHeader: the header contradicts the format or itself; says which claim, and what is there.
        TruncatedFile: the file is shorter than the header says.
        CheckpointNotFound: there is no such file.
    """
    file_bytes = check_file(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise TruncatedFile(f"{path}: {file_bytes} bytes are no safetensors file (8 at least); fetch it again")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise InvalidHeader(f"{path}: claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
        if 8 + length > file_bytes:
            raise TruncatedFile(
                f"{path}: the header claims {length} bytes, the file has {file_bytes - 8} more; fetch it again"
            )
        raw = file.read(length)
    entries = {
        name: _entry(path, name, claim, 8 + length)
        for name, claim in parse_object(raw, f"{path}: the header", unique=True).items()
        if name != "__metadata__"
    }
    _check_extents(path, list(entries.values()), 8 + length, file_bytes)
    return entries


def _entry(path: Path, name: str, claim: Any, data_start: int) -> TensorEntry:
    if not name or not isinstance(claim, dict):
        raise InvalidHeader(
            f"{path}: tensor {name!r} is described by {claim!r:.80}, expected dtype, shape and data_offsets"
        )
    dtype: Any = claim.get("dtype")
    shape: Any = claim.get("shape")
    offsets: Any = claim.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InvalidHeader(f"{path}: tensor {name!r} has dtype {dtype!r:.80}, which is not a safetensors dtype")
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS or prod(shape) > MAX_TENSOR_VALUES:
        raise InvalidHeader(f"{path}: tensor {name!r} has shape {shape!r:.80}, expected a list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidHeader(f"{path}: tensor {name!r} has data_offsets {offsets!r:.80}, expected [start, stop]")
    num_bytes = offsets[1] - offsets[0]
    expected = stored_bytes(dtype, shape)
    if num_bytes != expected:
        raise InvalidHeader(
            f"{path}: tensor {name!r} claims {num_bytes} bytes, but {dtype} of shape {shape} takes {expected}"
        )
    return TensorEntry(name, dtype, tuple(shape), Extent(path, data_start + offsets[0], num_bytes))


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_extents(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """Extents lie inside the file and do not overlap; holes are harmless and occur in the wild."""
    end, previous = data_start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.extent.offset, entry.extent.num_bytes)):
        stop = entry.extent.offset + entry.extent.num_bytes
        if stop > file_bytes:
            raise TruncatedFile(
                f"{path}: tensor {entry.name!r} ends at byte {stop}, the file at {file_bytes}; fetch it again"
            )
        if entry.extent.offset < end and entry.extent.num_bytes:
            raise InvalidHeader(
                f"{path}: tensor {entry.name!r} starts at byte {entry.extent.offset}, inside {previous!r} (up to {end})"
            )
        end, previous = max(end, stop), entry.name

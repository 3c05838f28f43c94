"""GGUF files: what their metadata say, and where their tensors lie. Split files are one checkpoint.

What an architecture's metadata mean is in :mod:`layerstream.checkpoint.gguf_config`, which parameter of a model each
tensor is in :mod:`layerstream.checkpoint.gguf_names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch

from layerstream.checkpoint.codecs.ggml import SUPPORTED
from layerstream.checkpoint.header import Extent, TensorEntry
from layerstream.checkpoint.reading import check_file
from layerstream.errors import CheckpointNotFound, InvalidHeader, TruncatedFile, UnsupportedFormat

ROPE_FACTORS = "rope_freqs.weight"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_TOKENIZER_LISTS = re.compile(r"tokenizer\..*\.(tokens|scores|token_type|merges)")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor: *shape* counts values, rows first; *entry* counts bytes."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checkpoint in GGUF, in one file or several.

    Attributes:
        metadata: what its header says, but for the tokenizer's lists.
        asked: keys of the architecture that were asked for so far.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    asked: set[str] = field(default_factory=set[str], compare=False)

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.metadata["general.architecture"])

    def said(self, key: str, default: Any = None) -> Any:
        """What the metadata say of the architecture under *key*; a list of equal numbers, one a layer, as that one."""
        self.asked.add(key)
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.entry.extent.num_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """What to compute in: as the plain matrices are stored; blocks of less than 16 bits in bfloat16."""
        kinds = {tensor.kind for tensor in self.tensors.values() if len(tensor.shape) > 1}
        if kinds <= {gguf.GGMLQuantizationType.F32}:
            return "float32"
        return "float16" if kinds <= {gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32} else "bfloat16"


def open_gguf(path: Path) -> GgufFile:
    """Read the header of *path*, and of its other splits.

    Raises:
        CheckpointNotFound: a split is missing.
        InvalidHeader, TruncatedFile: no GGUF file, or less of one than it says.
        UnsupportedFormat: a block type that is not supported.
    """
    paths = _splits(path)
    readers = [_read(item) for item in paths]
    metadata = {
        name: field.contents()
        for name, field in readers[0].fields.items()
        if field.types and not _TOKENIZER_LISTS.fullmatch(name)
    }
    if not isinstance(metadata.get("general.architecture"), str):
        raise InvalidHeader(f"{paths[0]}: its metadata have no general.architecture; fetch it again")
    tensors = {
        tensor.name: _tensor(item, tensor)
        for item, reader in zip(paths, readers, strict=True)
        for tensor in reader.tensors
    }
    return GgufFile(paths[0], metadata, tensors)


def _splits(path: Path) -> list[Path]:
    check_file(path)
    found = _SPLIT.search(path.name)
    if found is None:
        return [path]
    stem, count = path.name[: found.start()], int(found.group(2))
    paths = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [item.name for item in paths if not item.exists() and not item.is_symlink()]
    if missing:
        raise CheckpointNotFound(
            f"{path.parent}: {', '.join(missing[:3])} missing, of {count} files that belong together"
        )
    for item in paths:
        check_file(item)
    return paths


def _read(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        kind = TruncatedFile if path.stat().st_size and "GGUF magic" not in str(error) else InvalidHeader
        raise kind(f"{path}: no whole GGUF file ({error}); fetch it again") from error


def _tensor(path: Path, found: gguf.ReaderTensor) -> GgufTensor:
    kind = found.tensor_type
    if kind not in SUPPORTED:
        names = ", ".join(sorted(item.name for item in SUPPORTED))
        raise UnsupportedFormat(f"{path}: {found.name!r} is of type {kind.name}; supported are {names}")
    shape = tuple(int(size) for size in reversed(found.shape.tolist()))
    offset, num_bytes = int(found.data_offset), int(found.n_bytes)
    if offset + num_bytes > path.stat().st_size:
        raise TruncatedFile(f"{path}: {found.name!r} ends at byte {offset + num_bytes}, past the file; fetch it again")
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    stored = (*shape[:-1], shape[-1] // block_values * block_bytes)
    return GgufTensor(kind, shape, TensorEntry(found.name, "U8", stored, Extent(path, offset, num_bytes)))


def read_floats(tensor: GgufTensor) -> torch.Tensor:
    """The values of a small tensor of type F32, as rotary factors are."""
    extent = tensor.entry.extent
    with extent.path.open("rb") as opened:
        opened.seek(extent.offset)
        return torch.frombuffer(bytearray(opened.read(extent.num_bytes)), dtype=torch.float32)

"""GGUF files: where their tensors lie, and which parameter of a transformers model each of them is.

Names come from the gguf package, the config and the tokenizer from transformers. Split files are one checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import torch

from layerstream.checkpoint.codecs.ggml import SUPPORTED, Ggml
from layerstream.checkpoint.header import Extent, TensorEntry
from layerstream.checkpoint.names import PackedSource, ParameterSource, Source, check_sources, tie_sources
from layerstream.checkpoint.pieces import PiecedTensor, concatenate
from layerstream.checkpoint.reading import check_file
from layerstream.errors import CheckpointNotFound, InvalidHeader, TruncatedFile, UnsupportedFormat, UnsupportedModel

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen3moe"})
ROPE_FACTORS = "rope_freqs.weight"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SIZES = {"head_dim": "attention.key_length", "moe_intermediate_size": "expert_feed_forward_length"}
_MIXTRAL_SIZES = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor: *shape* counts values, rows first; *entry* counts bytes."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checkpoint in GGUF, in one file or several; *sizes* are the config's, where transformers does not read them."""

    path: Path
    architecture: str
    num_layers: int
    sizes: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]

    @property
    def is_mixtral(self) -> bool:
        """Llamas with experts have Llama's architecture by name."""
        return "num_local_experts" in self.sizes

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
        UnsupportedModel, UnsupportedFormat: an architecture, or a block type, that is not supported.
    """
    paths = _splits(path)
    readers = [_read(item) for item in paths]
    architecture = _field(readers[0], paths[0], "general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{path}: a GGUF file of architecture {architecture!r}; supported are {', '.join(sorted(ARCHITECTURES))}; "
            "use the safetensors original"
        )
    num_layers = _field(readers[0], paths[0], f"{architecture}.block_count")
    tensors = {
        tensor.name: _tensor(item, tensor)
        for item, reader in zip(paths, readers, strict=True)
        for tensor in reader.tensors
    }
    scaling = readers[0].get_field(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise UnsupportedModel(
            f"{path}: rotary positions are scaled ({scaling.contents()}), which is not read from GGUF; use the "
            "safetensors original"
        )
    has_experts = f"blk.0.{_EXPERTS['down_proj'][0]}.weight" in tensors
    wanted = _SIZES | (_MIXTRAL_SIZES if architecture == "llama" and has_experts else {})
    fields = {name: readers[0].get_field(f"{architecture}.{key}") for name, key in wanted.items()}
    sizes = {name: int(field.contents()) for name, field in fields.items() if field is not None}
    return GgufFile(paths[0], str(architecture), int(num_layers), sizes, tensors)


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


def _field(reader: gguf.GGUFReader, path: Path, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise InvalidHeader(f"{path}: its metadata has no {name}; fetch it again")
    return field.contents()


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


def read_rope_factors(file: GgufFile) -> torch.Tensor | None:
    """``(head_dim / 2,)``: what rotary frequencies are divided by (Llama 3.1 and later)."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    extent = tensor.entry.extent
    with extent.path.open("rb") as opened:
        opened.seek(extent.offset)
        return torch.frombuffer(bytearray(opened.read(extent.num_bytes)), dtype=torch.float32)


def resolve_gguf(model: Any, file: GgufFile) -> dict[str, Source]:
    """The source of every name in ``model.state_dict()``.

    Raises:
        MissingTensor: a parameter that nothing fills.
        InvalidHeader: a stored shape that is not the parameter's.
    """
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[file.architecture], file.num_layers)
    meta = model.state_dict()
    sources: dict[str, Source] = {}
    for name in meta:
        stored = _stored(name, names, file)
        if stored:
            sources[name] = _source(name, stored, file.architecture, model.config)
    tie_sources(model, sources)
    check_sources(meta, sources)
    return {name: sources[name] for name in meta}


def _stored(name: str, names: Any, file: GgufFile) -> list[GgufTensor]:
    """The tensors that parameter *name* consists of, one after the other along its rows."""
    stem, _, leaf = name.rpartition(".")
    if stem.endswith(".experts") and leaf in _EXPERTS:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        wanted = [f"blk.{layer.group(1)}.{part}.weight" for part in _EXPERTS[leaf]] if layer else []
    else:
        found = names.get_name(stem)
        wanted = [] if found is None else [f"{found}.{leaf}"]
    return [file.tensors[item] for item in wanted] if all(item in file.tensors for item in wanted) else []


def _source(name: str, stored: list[GgufTensor], architecture: str, config: Any) -> Source:
    first = stored[0]
    if len({tensor.kind for tensor in stored}) > 1:
        raise UnsupportedFormat(f"{first.entry.extent.path}: the tensors that form {name!r} have different types")
    rows, shape = prod(first.shape), first.shape
    if len(first.shape) > 1:
        rows = sum(tensor.shape[-2] for tensor in stored)
        shape = (*first.shape[:-2], rows, first.shape[-1])
    codec = Ggml(first.kind, _head_rows(name, rows, architecture, config), _offset(name, architecture))
    tensor = PiecedTensor.of(first.entry, 1)
    if len(stored) > 1:
        tensor = concatenate([PiecedTensor.of(part.entry, 1) for part in stored], len(first.shape) - 2)
    if not codec.is_quantised and not codec.head_rows and not codec.offset:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[codec.name]
        return ParameterSource(name, dtype, shape, tensor.pieces)
    plane = ParameterSource(f"{name}:weight", torch.uint8, tensor.shape, tensor.pieces)
    return PackedSource(name, codec, shape, {"weight": plane})


def _head_rows(name: str, rows: int, architecture: str, config: Any) -> int:
    """Rows per head where llama.cpp interleaves their halves."""
    if architecture != "llama":
        return 0
    if ".q_proj." in name:
        return rows // config.num_attention_heads
    return rows // config.num_key_value_heads if ".k_proj." in name else 0


def _offset(name: str, architecture: str) -> float:
    return 1.0 if architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0

"""From the names in a checkpoint to the parameters of a model.

Transformers knows how stored names and layouts become module parameters (renamings; fused experts). This module asks
it, key by key, the way its own loader does, and notes where the bytes lie instead of loading them. What would have to
*compute* (transpose, interleave) is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from layerstream.checkpoint.codecs.base import Codec, matrix_shape
from layerstream.checkpoint.header import TensorEntry
from layerstream.checkpoint.packed import PackedTensor
from layerstream.checkpoint.pieces import Piece, PiecedTensor, concatenate, split, stack
from layerstream.errors import InvalidHeader, MissingTensor, UnsupportedFormat

logger = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

PLANE_DTYPES = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8}

_Collected = dict[str, dict[str, list[TensorEntry]]]  # target -> source pattern -> entries, in natural order


@dataclass(frozen=True)
class ParameterSource:
    """Where the bytes of a parameter or persistent buffer lie; *dtype* is the stored one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Stored bytes."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def is_single(self) -> bool:
        """Whether it is one stored tensor, or one contiguous part of one."""
        return len(self.pieces) == 1


@dataclass(frozen=True)
class PackedSource:
    """Where the planes of a quantised matrix lie."""

    name: str
    codec: Codec
    shape: tuple[int, ...]
    planes: Mapping[str, ParameterSource]

    @property
    def num_bytes(self) -> int:
        """Stored bytes."""
        return sum(plane.num_bytes for plane in self.planes.values())

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of what is stored."""
        return matrix_shape(self.codec, self.shape)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of all planes."""
        return tuple(piece for plane in self.planes.values() for piece in plane.pieces)


Source: TypeAlias = ParameterSource | PackedSource


def resolve_parameters(
    model: Any,
    tensors: Mapping[str, TensorEntry],
    packed: Mapping[str, PackedTensor] | None = None,
    stand_ins: Mapping[str, str] | None = None,
) -> dict[str, Source]:
    """The source of every name in ``model.state_dict()``; tied names share one source object.

    Args:
        tensors, packed: by the name that the checkpoint has for the parameter.
        stand_ins: parameters that it may be without, and those whose source they then have.

    Raises:
        MissingTensor: a parameter that nothing fills.
        InvalidHeader: a stored shape that is not the parameter's.
        UnsupportedFormat: a conversion that computes, or a dtype that is not streamed.
    """
    meta = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, TensorEntry] = {}
    collected: _Collected = {}
    for key in sorted(tensors, key=dot_natural_key):
        target, pattern = _rename(key, model, meta, renamings, converters)
        if target not in meta:
            logger.debug("%s is in the checkpoint and not in the model", key)
        elif pattern is None:
            plain[target] = tensors[key]
        else:
            collected.setdefault(target, {}).setdefault(pattern, []).append(tensors[key])
    sources: dict[str, Source] = {target: _plain_source(target, entry) for target, entry in plain.items()}
    for target, by_source in collected.items():
        converter = by_pattern[next(iter(by_source))]
        sources.update(_convert(target, by_source, converter, meta))
    stacks: dict[str, dict[str, list[PackedTensor]]] = {}
    for key in sorted(packed or {}, key=dot_natural_key):
        matrix = (packed or {})[key]
        target, pattern = _rename(key, model, meta, renamings, converters)
        if pattern is not None:
            stacks.setdefault(target, {}).setdefault(pattern, []).append(matrix)
        elif target in meta:
            sources[target] = _packed_source(target, matrix)
    for target, packed_by_source in stacks.items():
        sources[target] = _stacked_source(target, packed_by_source, by_pattern[next(iter(packed_by_source))])
    tie_sources(model, sources)
    for name, other in (stand_ins or {}).items():
        if name not in sources and other in sources:
            sources[name] = sources[other]
    check_sources(meta, sources)
    return {name: sources[name] for name in meta}


def _rename(key: str, model: Any, meta: Mapping[str, Any], renamings: Any, converters: Any) -> tuple[str, str | None]:
    """Target name, and the converter's pattern if the tensor has to be put together: as transformers' loader does."""
    prefix = model.base_model_prefix
    target, pattern = rename_source_key(key, renamings, converters, prefix, meta)  # type: ignore[arg-type]
    if target not in meta and key in meta:
        return rename_source_key(key, [], [], prefix, meta)  # type: ignore[arg-type]
    return target, pattern


def transposed_names(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of the tensors with *shapes*, those that transformers' loader transposes for *model*."""
    patterns = [
        pattern
        for converter in get_model_conversion_mapping(model)
        if isinstance(converter, WeightConverter) and any(isinstance(item, Transpose) for item in converter.operations)
        for pattern in converter.source_patterns
    ]
    meta = model.state_dict()
    found = [key for key in shapes if key in meta and any(key.endswith(f".{pattern}") for pattern in patterns)]
    return [key for key in found if shapes[key] != tuple(meta[key].shape)]


def _plain_source(target: str, entry: TensorEntry) -> ParameterSource:
    return _source(target, entry, PiecedTensor.of(entry, _dtype(target, entry).itemsize))


def _source(target: str, entry: TensorEntry, tensor: PiecedTensor) -> ParameterSource:
    return ParameterSource(target, _dtype(target, entry), tensor.shape, tensor.pieces)


def _packed_source(target: str, matrix: PackedTensor) -> PackedSource:
    planes = {}
    for name, entry in matrix.planes.items():
        dtype = PLANE_DTYPES.get(entry.dtype)
        if dtype is None:
            raise UnsupportedFormat(f"{entry.extent.path}: {entry.name!r} has dtype {entry.dtype}, which is unknown")
        planes[name] = ParameterSource(
            f"{target}:{name}", dtype, entry.shape, PiecedTensor.of(entry, dtype.itemsize).pieces
        )
    return PackedSource(target, matrix.codec, matrix.shape, planes)


def _stacked_source(target: str, by_source: dict[str, list[PackedTensor]], converter: WeightConverter) -> PackedSource:
    """Quantised matrices of experts, of each its parts (gate and up), one below the other."""
    merges, joins = converter.operations[:1], converter.operations[1:]
    parts = [by_source.get(pattern, []) for pattern in converter.source_patterns]
    first = parts[0][0] if parts[0] else next(iter(by_source.values()))[0]
    can = all(isinstance(item, MergeModulelist) and item.dim == 0 for item in merges) and bool(merges)
    can = can and all(isinstance(item, Concatenate) and item.dim == 1 for item in joins)
    can = can and len({len(part) for part in parts}) == 1
    matrices = [matrix for group in zip(*parts, strict=False) for matrix in group]
    alike = all((matrix.codec, matrix.shape) == (first.codec, first.shape) for matrix in matrices)
    codec = first.codec.stacked(len(matrices)) if can and alike and len(first.shape) == 2 else None
    if codec is None:
        raise UnsupportedFormat(
            f"{first.planes['weight'].extent.path}: {first.name!r} is stored as {first.codec.name}, and would have to "
            f"be joined with others to {target!r}, which this version does not do for that format"
        )
    planes = {}
    for name in first.planes:
        whole = [_packed_source(target, matrix).planes[name] for matrix in matrices]
        pieces = concatenate([PiecedTensor(plane.shape, plane.dtype.itemsize, plane.pieces) for plane in whole], 0)
        planes[name] = ParameterSource(f"{target}:{name}", whole[0].dtype, pieces.shape, pieces.pieces)
    rows, columns = first.shape
    return PackedSource(target, codec, (len(parts[0]), rows * len(parts), columns), planes)


def _dtype(target: str, entry: TensorEntry) -> torch.dtype:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise UnsupportedFormat(
            f"{entry.extent.path}: {entry.name!r}, which becomes {target!r}, has dtype {entry.dtype}, which this "
            "version does not stream yet"
        )
    return dtype


def _convert(
    target: str, by_source: dict[str, list[TensorEntry]], converter: WeightConverter, meta: Mapping[str, Any]
) -> dict[str, ParameterSource]:
    """Run the converter's operations on pieces; the results by full target name."""
    first = next(iter(by_source.values()))[0]
    itemsize = _dtype(target, first).itemsize
    if {entry.dtype for entries in by_source.values() for entry in entries} != {first.dtype}:
        raise UnsupportedFormat(f"{first.extent.path}: the tensors that form {target!r} have different dtypes")
    values: dict[str, list[PiecedTensor]] = {
        pattern: [PiecedTensor.of(entry, itemsize) for entry in entries] for pattern, entries in by_source.items()
    }
    for operation in converter.operations:
        values = _apply(operation, values, converter, target, meta)
    results = {}
    for pattern, (tensor,) in values.items():
        name = target.replace(converter.target_patterns[0], pattern) if len(values) > 1 else target
        results[name] = _source(name, first, tensor)
    return results


def _apply(
    operation: Any,
    values: dict[str, list[PiecedTensor]],
    converter: WeightConverter,
    target: str,
    meta: Mapping[str, Any],
) -> dict[str, list[PiecedTensor]]:
    targets = converter.target_patterns
    if isinstance(operation, MergeModulelist) and operation.dim == 0:
        return {pattern: [stack(tensors)] for pattern, tensors in values.items()}
    if isinstance(operation, Concatenate):
        ordered = [tensor for pattern in converter.source_patterns for tensor in values.get(pattern, [])]
        return {targets[0]: [concatenate(ordered, operation.dim)]}
    if isinstance(operation, Transpose) and all(t.shape == tuple(meta[target].shape) for (t,) in values.values()):
        return values  # the module takes it as it is stored
    if isinstance(operation, Chunk | Split) and len(values) == 1 and len(targets) > 1:
        tensor = next(iter(values.values()))[0]
        sizes = _sizes(operation, tensor, targets, target, meta)
        return {name: [part] for name, part in zip(targets, split(tensor, sizes, operation.dim), strict=True)}
    raise UnsupportedFormat(
        f"{target!r} is stored in a layout that has to be computed ({operation!r}); save the model once with "
        "save_original_format=False, which writes it as the modules have it"
    )


def _sizes(
    operation: Any, tensor: PiecedTensor, targets: Sequence[str], target: str, meta: Mapping[str, Any]
) -> list[int]:
    if isinstance(operation, Split):
        return [meta[target.replace(targets[0], name)].shape[operation.dim] for name in targets]
    return [tensor.shape[operation.dim] // len(targets)] * len(targets)


def tie_sources(model: Any, sources: dict[str, Source]) -> None:
    """Tied names that the checkpoint has once share that one; those that it has twice keep their own, as stored."""
    for target, source in model.all_tied_weights_keys.items():
        if target not in sources and source in sources:
            sources[target] = sources[source]
        elif source not in sources and target in sources:
            sources[source] = sources[target]


def check_sources(meta: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
    """Every name of the model has a source, of its shape.

    Raises:
        MissingTensor, InvalidHeader: one has not.
        UnsupportedFormat: it has integers where the model has floats.
    """
    missing = [name for name in meta if name not in sources]
    if missing:
        shown = ", ".join(missing[:3])
        raise MissingTensor(
            f"the checkpoint has nothing for {len(missing)} of {len(meta)} parameters: {shown}"
            f"{', …' if len(missing) > 3 else ''}; it is incomplete, or of another model than its config.json says"
        )
    for name, tensor in meta.items():
        found, expected = sources[name].shape, tuple(tensor.shape)
        if found != expected:
            raise InvalidHeader(f"{name!r} is stored with shape {list(found)!s:.80}; config.json says {list(expected)}")
        source = sources[name]
        if isinstance(source, ParameterSource) and source.dtype.is_floating_point != tensor.is_floating_point():
            raise UnsupportedFormat(
                f"{name!r} is stored as {source.dtype}, and the model computes with {tensor.dtype}: the weights are "
                "quantised, and config.json has no quantization_config that says how; use the 16-bit original"
            )

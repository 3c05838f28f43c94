"""Matrices that are stored quantised: which tensors of a checkpoint form one, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from layerstream.checkpoint.codecs.base import FLOATS, Codec, matrix_shape
from layerstream.checkpoint.codecs.bnb import Bnb4, BnbInt8
from layerstream.checkpoint.codecs.fp8 import Fp8
from layerstream.checkpoint.codecs.ggml import SUPPORTED, Ggml, block_values
from layerstream.checkpoint.codecs.int4 import Awq, CompressedInt4, Gptq
from layerstream.checkpoint.codecs.mxfp4 import BLOCK, Mxfp4
from layerstream.checkpoint.codecs.tiled import TILE, TILED_METHOD, TiledInt4
from layerstream.checkpoint.codecs.tiled_ggml import TiledGgml
from layerstream.checkpoint.header import TensorEntry
from layerstream.checkpoint.reading import parse_object
from layerstream.checkpoint.schemes import check_gptq, compressed_scheme, fp8_blocks, group_size, method_of
from layerstream.errors import InvalidHeader, UnsupportedFormat

_STATE = "quant_state.bitsandbytes__"
_BNB4_PLANES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCKS = re.compile(r"_blocks_([A-Z0-9_]+)$")
GGML_KINDS = {kind.name: kind for kind in SUPPORTED}
MAX_STATE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A matrix and the stored tensors that it consists of; *shape* is that of its values."""

    name: str
    codec: Codec
    shape: tuple[int, ...]
    planes: Mapping[str, TensorEntry]


def find_packed(
    tensors: Mapping[str, TensorEntry], quantisation: Mapping[str, Any]
) -> tuple[dict[str, TensorEntry], dict[str, PackedTensor]]:
    """Part *tensors* into plain ones and packed matrices, by the name of the parameter that each is.

    Args:
        quantisation: the ``quantization_config`` of the checkpoint's config.

    Raises:
        UnsupportedFormat: a method that is not known; names those that are.
        InvalidHeader: planes that do not fit each other.
    """
    method = method_of(quantisation)
    finder = _FINDERS.get(method)
    if finder is None:
        raise UnsupportedFormat(
            f"the weights are quantised by {method!r}, which is not supported; supported are "
            f"{', '.join(sorted(_FINDERS))}; use such a version of the model, or the 16-bit original"
        )
    packed = finder(tensors, quantisation)
    used = {entry.name for matrix in packed.values() for entry in matrix.planes.values()}
    ignored = (".weight_format", ".weight_shape", _STATE)
    plain = {
        name: entry for name, entry in tensors.items() if name not in used and not any(part in name for part in ignored)
    }
    for matrix in packed.values():
        _check(matrix)
    return plain, packed


def _bitsandbytes(tensors: Mapping[str, TensorEntry], _: Mapping[str, Any]) -> dict[str, PackedTensor]:
    found: dict[str, PackedTensor] = {}
    for name, entry in tensors.items():
        if f".{_STATE}" in name:
            weight = name.partition(f".{_STATE}")[0]
            planes = {key: tensors[f"{weight}.{key}"] for key in _BNB4_PLANES if f"{weight}.{key}" in tensors}
            codec, shape = _bnb4(entry, name.rpartition("__")[2])
            if weight not in tensors:
                raise InvalidHeader(f"{entry.extent.path}: {name!r} describes {weight!r}, which is not there")
            found[weight] = PackedTensor(weight, codec, shape, {"weight": tensors[weight], **planes})
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            stored = tensors.get(weight)
            if stored is None or len(stored.shape) != 2:
                raise InvalidHeader(f"{entry.extent.path}: {name!r} has scales of {weight!r}, which is no matrix there")
            planes = {"weight": stored, "SCB": entry}
            found[weight] = PackedTensor(weight, BnbInt8(), (stored.shape[0], stored.shape[1]), planes)
    return found


def _bnb4(entry: TensorEntry, kind: str) -> tuple[Bnb4, tuple[int, int]]:
    """Codec and shape, out of the JSON that bitsandbytes keeps in a tensor."""
    if entry.extent.num_bytes > MAX_STATE_BYTES:
        raise InvalidHeader(f"{entry.extent.path}: {entry.name!r} has {entry.extent.num_bytes} bytes of JSON")
    with entry.extent.path.open("rb") as file:
        file.seek(entry.extent.offset)
        raw = file.read(entry.extent.num_bytes)
    try:
        state = parse_object(raw, f"{entry.extent.path}: {entry.name!r}")
        rows, columns = (int(size) for size in state["shape"])
        blocksize = int(state["blocksize"])
        nested = None
        if "nested_blocksize" in state:
            nested = int(state["nested_blocksize"]), float(state["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidHeader(f"{entry.extent.path}: {entry.name!r} is no quantisation state ({error})") from error
    if min(rows, columns, blocksize) < 1 or blocksize % 2:
        raise InvalidHeader(f"{entry.extent.path}: {entry.name!r} says shape {rows, columns}, blocks of {blocksize}")
    return Bnb4(kind, columns, blocksize, nested), (rows, columns)


def _fp8(tensors: Mapping[str, TensorEntry], quantisation: Mapping[str, Any]) -> dict[str, PackedTensor]:
    return _fp8_in(tensors, fp8_blocks(quantisation))


def _fp8_in(tensors: Mapping[str, TensorEntry], blocks: Sequence[tuple[int, int]]) -> dict[str, PackedTensor]:
    """FP8 matrices, in one of *blocks*, or with a scale for each row or for all."""
    found = {}
    for name, entry in tensors.items():
        if entry.dtype == "F8_E4M3" and len(entry.shape) == 2:
            scale = tensors.get(f"{name}_scale_inv") or tensors.get(f"{name}_scale")
            if scale is None:
                raise InvalidHeader(f"{entry.extent.path}: {name!r} is FP8 and has no {name}_scale_inv")
            planes = {"weight": entry, "scale": scale}
            rows, columns = entry.shape
            found[name] = PackedTensor(name, _fp8_codec(entry, scale, blocks), (rows, columns), planes)
    return found


def _fp8_codec(entry: TensorEntry, scale: TensorEntry, blocks: Sequence[tuple[int, int]]) -> Fp8:
    """The one of *blocks* whose grid of scales is that of *scale*."""
    rows, columns = entry.shape
    grid = (*scale.shape, *(1,) * (2 - len(scale.shape)))
    tried = [(min(high, rows), min(wide, columns)) for high, wide in (*blocks, (1, columns), (rows, columns))]
    codecs = {Fp8(rows, block) for block in tried if min(block)}
    fitting = [codec for codec in codecs if codec.expected(rows, columns)["scale"] == grid]
    if len(fitting) != 1:
        said = " or ".join(str(list(block)) for block in blocks) or "a row, or of all"
        raise InvalidHeader(
            f"{entry.extent.path}: {entry.name!r} of shape {list(entry.shape)} has scales of shape "
            f"{list(scale.shape)}, which are not those of blocks of {said}, as the quantization_config says"
        )
    return replace(fitting[0], scale_dims=len(scale.shape))


def _compressed_tensors(tensors: Mapping[str, TensorEntry], quantisation: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """int4 as ``pack-quantized``, FP8 as ``float-quantized``."""
    scheme = compressed_scheme(quantisation)
    found = _fp8_in(tensors, scheme.blocks)
    for name, entry in tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        stem = name.removesuffix("_packed")
        scale, zero = tensors.get(f"{stem}_scale"), tensors.get(f"{stem}_zero_point")
        if scale is None or len(scale.shape) != 2 or len(entry.shape) != 2 or not scale.shape[1]:
            raise InvalidHeader(f"{entry.extent.path}: {name!r} has no {stem}_scale by rows and groups")
        if f"{stem}_g_idx" in tensors:
            raise UnsupportedFormat(f"{entry.extent.path}: {stem!r} has its columns in another order (actorder)")
        rows, columns = entry.shape[0], entry.shape[1] * 8
        group, rest = divmod(columns, scale.shape[1])
        if rest or (scheme.group_sizes and scale.shape[1] > 1 and group not in scheme.group_sizes):
            said = " or ".join(map(str, sorted(scheme.group_sizes))) or "equal size"
            raise InvalidHeader(
                f"{entry.extent.path}: {stem!r} has scales of shape {list(scale.shape)} for {columns} columns, which "
                f"are not those of groups of {said}, as the quantization_config says"
            )
        planes = {"weight": entry, "scale": scale} | ({} if zero is None else {"zero": zero})
        found[stem] = PackedTensor(stem, CompressedInt4(group, zero is None), (rows, columns), planes)
    return found


def _tiled(tensors: Mapping[str, TensorEntry], _: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """The format of ``quantization="int4"``, and what of a GGUF file does not lie in tiles: its blocks."""
    found = {}
    for name, entry in tensors.items():
        if name.endswith(".weight_tiles"):
            stem = name.removesuffix("_tiles")
            scale = tensors.get(f"{stem}_scale")
            can = scale is not None and len(scale.shape) == 4 and len(entry.shape) == 3 and scale.shape[1]
            if scale is None or not can or entry.shape[1] % scale.shape[1]:
                raise InvalidHeader(f"{entry.extent.path}: {name!r} is no matrix in tiles, or without its {stem}_scale")
            shape = entry.shape[0] * TILE, entry.shape[1]
            codec = TiledInt4(shape[1] // scale.shape[1])
            if scale.dtype == "F16":
                codec = TiledGgml(codec.group, has_lowest=scale.shape[3] == 2)
            found[stem] = PackedTensor(stem, codec, shape, {"weight": entry, "scale": scale})
        elif (blocks := _BLOCKS.search(name)) is not None:
            stem, kind = name[: blocks.start()], GGML_KINDS.get(blocks.group(1))
            if kind is None or len(entry.shape) < 2:
                raise InvalidHeader(f"{entry.extent.path}: {name!r} has no blocks of a type that is known")
            shape = *entry.shape[:-1], block_values(kind, entry.shape[-1])
            rows = replace(entry, shape=(prod(shape[:-1]), entry.shape[-1]))  # experts one below the other
            found[stem] = PackedTensor(stem, Ggml(kind), shape, {"weight": rows})
    return found


def _mxfp4(tensors: Mapping[str, TensorEntry], _: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """gpt-oss: the experts' matrices of a layer."""
    found = {}
    for name, entry in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            scale = tensors.get(f"{stem}_scales")
            if scale is None or len(entry.shape) != 4:
                raise InvalidHeader(
                    f"{entry.extent.path}: {name!r} has no experts' blocks, or is without {stem}_scales"
                )
            experts, rows, blocks = entry.shape[:3]
            planes = {"weight": entry, "scale": scale}
            found[stem] = PackedTensor(stem, Mxfp4(experts), (experts, blocks * BLOCK, rows), planes)
    return found


def _gptq(tensors: Mapping[str, TensorEntry], quantisation: Mapping[str, Any]) -> dict[str, PackedTensor]:
    check_gptq(quantisation)
    shift = 0 if quantisation.get("checkpoint_format") == "gptq_v2" else 1
    found = {}
    for stem, planes in _transposed(tensors, quantisation, {"g_idx": "g_idx"}):
        columns, rows = planes["weight"].shape[0] * 8, planes["weight"].shape[1]
        codec = Gptq(group_size(quantisation, columns), shift, in_order=quantisation.get("desc_act") is False)
        found[stem] = PackedTensor(stem, codec, (rows, columns), planes)
    return found


def _awq(tensors: Mapping[str, TensorEntry], quantisation: Mapping[str, Any]) -> dict[str, PackedTensor]:
    if (version := str(quantisation.get("version", "gemm")).lower()) != "gemm":
        raise UnsupportedFormat(f"the weights are in AWQ's layout {version!r}; supported is 'gemm'")
    found = {}
    for stem, planes in _transposed(tensors, quantisation, {}):
        columns, rows = planes["weight"].shape[0], planes["weight"].shape[1] * 8
        group = group_size(quantisation, columns)
        if not columns or columns % group:
            raise InvalidHeader(f"{planes['weight'].extent.path}: {stem!r} has {columns} columns, in groups of {group}")
        codec = Awq(group)
        found[stem] = PackedTensor(stem, codec, (rows, columns), planes)
    return found


def _transposed(
    tensors: Mapping[str, TensorEntry], quantisation: Mapping[str, Any], more: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, TensorEntry]]]:
    """What GPTQ and AWQ have in common: the parameter's name, and the planes."""
    bits = quantisation.get("bits", quantisation.get("w_bit", 4))
    if bits != 4:
        raise UnsupportedFormat(f"the weights are quantised to {bits!r:.80} bits by this method; supported are 4")
    group_size(quantisation, 1)  # checked even where nothing is quantised
    wanted = {"weight": "qweight", "scale": "scales", "zero": "qzeros", **more}
    for name, entry in tensors.items():
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            missing = [f"{stem}.{suffix}" for suffix in wanted.values() if f"{stem}.{suffix}" not in tensors]
            if missing or len(entry.shape) != 2:
                raise InvalidHeader(f"{entry.extent.path}: {name!r} is no matrix, or without {', '.join(missing)}")
            yield f"{stem}.weight", {plane: tensors[f"{stem}.{suffix}"] for plane, suffix in wanted.items()}


def _check(matrix: PackedTensor) -> None:
    """Planes have the shapes that the codec takes, of the dtypes that it computes with."""
    expected = matrix.codec.expected(*matrix_shape(matrix.codec, matrix.shape))
    for name, shape in expected.items():
        entry = matrix.planes.get(name)
        if entry is None:
            path = matrix.planes["weight"].extent.path
            raise InvalidHeader(f"{path}: {matrix.name!r} is stored as {matrix.codec.name} without its {name}")
        if entry.shape != shape:
            raise InvalidHeader(
                f"{entry.extent.path}: {entry.name!r} has shape {list(entry.shape)}; a matrix of {list(matrix.shape)} "
                f"in {matrix.codec.name} needs {list(shape)}"
            )
        dtypes = matrix.codec.dtypes.get(name, FLOATS)
        if entry.dtype not in dtypes:
            raise InvalidHeader(
                f"{entry.extent.path}: {entry.name!r} has dtype {entry.dtype}; {matrix.codec.name} needs "
                f"{' or '.join(sorted(dtypes))}"
            )


_FINDERS = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    TILED_METHOD: _tiled,
}

"""Which tensors of a GGUF file each parameter of a model is made of, and what has to be undone to them.

Names are the gguf package's; what it leaves out is in a table here. A tensor that the model has no place for is an
error: left out in silence, it would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Any

import gguf
import torch

from layerstream.checkpoint.codecs.base import Codec
from layerstream.checkpoint.codecs.ggml import Ggml
from layerstream.checkpoint.codecs.ggml_joined import ByTurns, LatentUp
from layerstream.checkpoint.gguf import ROPE_FACTORS, GgufFile, GgufTensor
from layerstream.checkpoint.gguf_architectures import Architecture, architecture_of
from layerstream.checkpoint.gguf_config import num_layers
from layerstream.checkpoint.names import PackedSource, ParameterSource, Source, check_sources, tie_sources
from layerstream.checkpoint.pieces import PiecedTensor, concatenate
from layerstream.errors import UnsupportedFormat

_GATE_UP = "experts.gate_up_proj"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {  # ends of parameters' names, and what they may be stored as
    _GATE_UP: (("ffn_gate_exps.weight", "ffn_up_exps.weight"), ("ffn_gate_up_exps.weight",)),
    "experts.down_proj": (("ffn_down_exps.weight",),),
    "experts.gate_up_proj_bias": (("ffn_gate_exps.bias", "ffn_up_exps.bias"), ("ffn_gate_up_exps.bias",)),
    "experts.down_proj_bias": (("ffn_down_exps.bias",),),
    "e_score_correction_bias": (("exp_probs_b.bias",), ("exp_probs_b",)),
    "block_sparse_moe.router.weight": (("ffn_gate_inp.weight",),),
    "shared_mlp.input_linear.weight": (("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),),
    "shared_mlp.output_linear.weight": (("ffn_down_shexp.weight",),),
    "router.scale": (("ffn_gate_inp.scale",),),
    "router.per_expert_scale": (("ffn_down_exps.scale",),),
    "layer_scalar": (("layer_output_scale.weight",),),
    "self_attn.sinks": (("attn_sinks.weight",),),
    "self_attn.kv_b_proj.weight": (("attn_k_b.weight", "attn_v_b.weight"), ("attn_kv_b.weight",)),
}
_NOT_PARAMETERS = frozenset({ROPE_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight"})
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def resolve_gguf(model: Any, file: GgufFile) -> dict[str, Source]:
    """The source of every name in ``model.state_dict()``.

    Raises:
        MissingTensor: a parameter that nothing fills.
        InvalidHeader: a stored shape that is not the parameter's.
        UnsupportedFormat: a tensor that the model has no place for, or parts of one of different types.
    """
    row, count = architecture_of(file), num_layers(file)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[row.name], count)
    meta = model.state_dict()
    sources: dict[str, Source] = {}
    used: set[str] = set()
    for name, parameter in meta.items():
        stored = _stored(name, names, file)
        if stored:
            sources[name] = _source(name, stored, row, model.config, tuple(parameter.shape))
            used |= {tensor.entry.name for tensor in stored}
    _check_used(file, row, used, count)
    tie_sources(model, sources)
    check_sources(meta, sources)
    return {name: sources[name] for name in meta}


def _stored(name: str, names: Any, file: GgufFile) -> list[GgufTensor]:
    """The tensors that parameter *name* consists of, one after the other along its rows."""
    for wanted in _candidates(name, names):
        if all(item in file.tensors for item in wanted):
            return [file.tensors[item] for item in wanted]
    return []


def _candidates(name: str, names: Any) -> Iterator[list[str]]:
    layer = _LAYER.search(name)
    if layer is not None:
        for parts in next((parts for end, parts in _PARTS.items() if layer.group(2).endswith(end)), ()):
            yield [f"blk.{layer.group(1)}.{part}" for part in parts]
    stem, _, leaf = name.rpartition(".")
    if (found := names.get_name(stem)) is not None:
        yield [f"{found}.{leaf}"]


def _check_used(file: GgufFile, row: Architecture, used: set[str], count: int) -> None:
    """Blocks after the last layer predict further tokens; they are left out."""
    over = [name for name in file.tensors if name not in used and name not in _NOT_PARAMETERS and _layer(name) < count]
    left = [name for name in over if name.partition(".")[2].partition(".")[2] not in row.ignores]
    if left:
        raise UnsupportedFormat(
            f"{file.path}: has {left[0]!r} and {len(left) - 1} more tensors that {file.architecture!r} models, as they "
            "are known here, have no place for; use the safetensors original"
        )


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def _source(name: str, stored: list[GgufTensor], row: Architecture, config: Any, wanted: tuple[int, ...]) -> Source:
    first = stored[0]
    if name.endswith("kv_b_proj.weight") and len(stored) > 1:
        return _latent_up(name, stored, config, wanted)
    if len({tensor.kind for tensor in stored}) > 1:
        raise UnsupportedFormat(f"{first.entry.extent.path}: the tensors that form {name!r} have different types")
    axis = max(0, len(first.shape) - 2)
    if name.endswith("_bias") and len(first.shape) == 2:
        axis = 1
    pieces = PiecedTensor.of(first.entry, 1)
    if len(stored) > 1:
        pieces = concatenate([PiecedTensor.of(part.entry, 1) for part in stored], axis)
    size = sum(tensor.shape[axis] for tensor in stored)
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    codec = _codec(name, first, row, config, shape)
    if codec.transposes:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if _without_ones(shape) == _without_ones(wanted):
        shape = wanted
    if codec == Ggml(first.kind) and first.kind.name in _PLAIN:
        return ParameterSource(name, _PLAIN[first.kind.name], shape, pieces.pieces)
    plane = ParameterSource(f"{name}:weight", torch.uint8, pieces.shape, pieces.pieces)
    return PackedSource(name, codec, shape, {"weight": plane})


def _codec(name: str, tensor: GgufTensor, row: Architecture, config: Any, shape: tuple[int, ...]) -> Codec:
    """What undoes what the converter did to a parameter that is stored with *shape*."""
    if row.alternates and name.endswith(f"{_GATE_UP}_bias"):
        return ByTurns()
    is_expert = len(shape) == 3
    swapped = None
    if row.swaps_heads and (heads := _heads(name, config)):
        swapped = (shape[0] // heads // 2, 2)
    elif row.alternates and name.endswith(_GATE_UP):
        swapped = (2, shape[-2] // 2)
    offset = row.norm_offset if name.endswith("norm.weight") else 0.0
    return Ggml(tensor.kind, swapped, offset, is_expert and row.transposes_experts)


def _heads(name: str, config: Any) -> int:
    """Rotary heads whose rows *name* has."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def _latent_up(name: str, stored: list[GgufTensor], config: Any, wanted: tuple[int, ...]) -> PackedSource:
    keys, values = stored
    codec = LatentUp(Ggml(keys.kind), Ggml(values.kind), config.qk_nope_head_dim, config.v_head_dim)
    planes = {
        plane: ParameterSource(
            f"{name}:{plane}",
            torch.uint8,
            (prod(tensor.entry.shape[:-1]), tensor.entry.shape[-1]),
            PiecedTensor.of(tensor.entry, 1).pieces,
        )
        for plane, tensor in (("keys", keys), ("values", values))
    }
    return PackedSource(name, codec, wanted, planes)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]

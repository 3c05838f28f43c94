"""The sizes of transformers' modules, as the files have them and as they are computed with: what plans are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import TypeGuard

import torch

from layerstream.checkpoint.codecs.tiled import tiled, tiled_bytes
from layerstream.checkpoint.names import PackedSource, Source
from layerstream.core.sizes import PAGE
from layerstream.model import experts
from layerstream.model.linear import decode_bytes
from layerstream.model.trace import Trace
from layerstream.planner.units import ExpertsNode, WeightNode


class Weigher:
    """Finds the sizes of modules.

    Args:
        leaves_experts: those that may come as they are routed to are left out, and put into ``experts``.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        dtypes: Mapping[str, torch.dtype],
        tile_values: int,
        traced: Trace,
        *,
        leaves_experts: bool = False,
    ) -> None:
        self.experts: list[ExpertsNode] = []
        self._sources = sources
        self._dtypes = dtypes
        self._tile_values = tile_values
        self._traced = traced
        self._leaves_experts = leaves_experts

    def weigh(self, module: torch.nn.Module, path: str) -> WeightNode:
        """The sizes of *module* and of what is below it.

        A block with experts stays in one piece: they cannot be cut anyway, and what it computes between its parts (a
        gate's sigmoid) has to see the rows of one row block at a time. So do attention over latents, and a module that
        calls methods of its parts. A layer that has its experts without a block (Gemma 4) is cut, and they are one
        piece.
        """
        if self._stays_whole(module, path):
            return self._weigh_whole(module, path)
        sources, dtypes = self._sources, self._dtypes
        last, order = len(self._traced.order), self._traced.order
        parts = {f"{path}.{name}": child for name, child in module.named_children()}
        paths = sorted((at for at in parts if at not in self._traced.idle), key=lambda at: order.get(at, last))
        children = tuple(self.weigh(parts[at], at) for at in paths)
        owners = {path: module, **{at: parts[at] for at in parts.keys() & self._traced.idle}}
        own = [key for at, part in owners.items() for name in _own_names(part) if (key := f"{at}.{name}") in sources]
        node = WeightNode(
            name=path,
            own_bytes=sum(sources[key].num_bytes for key in own),
            compute_bytes=sum(_compute_bytes(sources[key], dtypes[key]) for key in own),
            num_rows=module.out_features if is_plain_linear(module) else 0,
            is_list=path in self._traced.lists,
            children=children,
        )
        matrix = sources.get(f"{path}.weight")
        if not node.num_rows or not isinstance(matrix, PackedSource):
            return node
        dtype = dtypes[f"{path}.weight"]
        return dataclasses.replace(
            node,
            row_step=matrix.codec.row_step,
            decode_bytes=decode_bytes(matrix, dtype, self._tile_values),
            value_bytes=prod(matrix.shape) * dtype.itemsize,
            codec=matrix.codec.name,
            kernel=(tiled(matrix.codec, matrix.shape[1]) or matrix.codec).kernel,
        )

    def _weigh_whole(self, module: torch.nn.Module, path: str) -> WeightNode:
        keys, left = {key for key in self._sources if key.startswith(f"{path}.")}, ""
        if self._leaves_experts and not self._traced.attends_in(path) and (left := _experts_in(module, path)):
            keys -= set(self._leave(module if left == path else module.get_submodule(left[len(path) + 1 :]), left))
        return WeightNode(
            path,
            sum(self._sources[key].num_bytes for key in keys),
            sum(_compute_bytes(self._sources[key], self._dtypes[key]) for key in keys),
            decode_bytes=_whole_decode_bytes(keys, self._sources, self._dtypes),
            experts=left,
        )

    def _stays_whole(self, module: torch.nn.Module, path: str) -> bool:
        if path in self._traced.mingled or is_fused_experts(module):
            return True
        attends_alone = any(layer.path == path and layer.is_alone for layer in self._traced.layers)
        return attends_alone or (bool(_experts_in(module, path)) and not self._traced.attends_in(path))

    def _leave(self, module: torch.nn.Module, path: str) -> list[str]:
        """Note the experts *module*; the names of their weights."""
        keys = [f"{path}.{name}" for name in experts.weight_names(module)]
        sources = {key: self._sources[key] for key in keys}
        num_experts = int(module.num_experts)  # type: ignore[arg-type]
        num_parts = sum(len(source.planes) if isinstance(source, PackedSource) else 1 for source in sources.values())
        expert_bytes = sum(_of_one(source, num_experts) for source in sources.values())
        self.experts.append(
            ExpertsNode(
                name=path,
                num_experts=num_experts,
                top_k=self._traced.top_k.get(path, 1),
                expert_bytes=expert_bytes,
                slot_bytes=(-(-expert_bytes // PAGE) + 2 * num_parts) * PAGE,
                scratch_bytes=_expert_scratch_bytes(sources, self._dtypes),
                num_values=sum(prod(source.shape) // num_experts for source in sources.values()),
                codec=next((s.codec.name for s in sources.values() if isinstance(s, PackedSource)), ""),
                kernel=next((s.codec.kernel for s in sources.values() if isinstance(s, PackedSource)), ""),
            )
        )
        return keys


def _experts_in(module: torch.nn.Module, path: str) -> str:
    """Path of the experts that *module*, at *path*, is or has; ``""``: none."""
    if is_fused_experts(module):
        return path
    return next((f"{path}.{name}" for name, child in module.named_children() if is_fused_experts(child)), "")


def _of_one(source: Source, num_experts: int) -> int:
    """Bytes that one expert needs of *source*, what belongs to all of them included."""
    if not isinstance(source, PackedSource):
        return source.num_bytes // num_experts
    whole = sum(plane.num_bytes for name, plane in source.planes.items() if name in source.codec.whole)
    return whole + (source.num_bytes - whole) // num_experts


def _expert_scratch_bytes(sources: Mapping[str, Source], dtypes: Mapping[str, torch.dtype]) -> int:
    """What one expert takes as it is computed with, as far as it is stored otherwise, and one of its matrices while it
    is decoded."""
    values = {key: prod(source.shape[1:]) for key, source in sources.items()}
    packed = {key for key, source in sources.items() if isinstance(source, PackedSource)}
    converted = {k for k, s in sources.items() if not isinstance(s, PackedSource) and s.dtype != dtypes[k]}
    found = sum(values[key] * dtypes[key].itemsize for key in packed | converted)
    return found + max((12 * values[key] for key in packed), default=0)


def is_plain_linear(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether it computes what ``torch.nn.Linear`` does (Llama 4's router derives from it and returns more)."""
    return isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward


def _whole_decode_bytes(keys: set[str], sources: Mapping[str, Source], dtypes: Mapping[str, torch.dtype]) -> int:
    """What a block with experts takes whose quantised weights are decoded before it computes, of experts one, and one
    of them in fp32."""
    sizes = [
        (prod(source.shape[-2:]), dtypes[key].itemsize)
        for key in keys
        if isinstance(source := sources[key], PackedSource)
    ]
    return sum(values * size for values, size in sizes) + max((12 * values for values, _ in sizes), default=0)


def _compute_bytes(source: Source, dtype: torch.dtype) -> int:
    """What it takes when it is resident: quantised weights stay so, perhaps rewritten for a kernel."""
    if isinstance(source, PackedSource):
        target = tiled(source.codec, source.shape[-1]) if len(source.shape) == 2 and dtype == torch.bfloat16 else None
        return max(source.num_bytes, tiled_bytes(target, *source.matrix_shape) if target is not None else 0)
    return source.num_bytes // source.dtype.itemsize * dtype.itemsize


def is_fused_experts(module: torch.nn.Module) -> bool:
    """Whether it has the matrices of all experts of a block, each kind in one tensor."""
    return hasattr(module, "_is_expert_parallel")  # set by transformers' decorator on every fused experts module


def _own_names(module: torch.nn.Module) -> list[str]:
    return [*module._parameters, *(name for name in module._buffers if name not in module._non_persistent_buffers_set)]

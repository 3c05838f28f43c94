"""Mixtures of experts: each routed expert computes its rows in row blocks of fixed size.

Registered as the experts implementation ``"layerstream"`` of transformers' ``ExpertsInterface``. How many rows an
expert gets depends on the whole row block; padding them to a constant keeps a row's bits free of its neighbours. Rows
of padding are routed to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface

from layerstream.checkpoint.names import PackedSource
from layerstream.model.context import current

IMPLEMENTATION = "layerstream"
EXPERT_ROWS = 16  # rows per expert and call; 1 where the row block itself is one row


class PackedExperts:
    """Quantised matrices of experts in the place of a parameter ``(experts, …)``: ``[expert]`` decodes one of them.

    Args:
        scratch: ``(rows, columns)`` of one expert; overwritten when another one is asked for.
    """

    def __init__(self, source: PackedSource, planes: Mapping[str, torch.Tensor], scratch: torch.Tensor) -> None:
        self._source = source
        self._planes = planes
        self._scratch = scratch
        self._present: int | None = None

    def __getitem__(self, expert: int) -> torch.Tensor:
        if self._present != expert:
            rows, codec = self._scratch.shape[0], self._source.codec
            first = expert * rows
            planes = codec.cut(self._planes, self._source.matrix_shape[0], first, first + rows)
            codec.decode(planes, first, self._scratch)
            self._present = expert
        return self._scratch.T if self._source.codec.transposes else self._scratch


def register() -> None:
    """Make ``experts_implementation="layerstream"`` known to transformers. Idempotent."""
    ExpertsInterface.register(IMPLEMENTATION, compute_experts)


def compute_experts(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over each row's routed experts.

    Args:
        module: a fused experts module (``gate_up_proj`` or ``up_proj``, and ``down_proj``, all ``(experts, …)``).
        hidden_states: ``(rows, hidden)``.
        top_k_index, top_k_weights: ``(rows, k)``.

    Returns:
        ``(rows, hidden)``. A row's experts are added in ascending order.
    """
    context = current()
    num_real = hidden_states.shape[0]
    if context.is_single_block:
        num_real -= context.active[0][1].num_padding
    rows_per_call = 1 if hidden_states.shape[0] == 1 else EXPERT_ROWS
    result = torch.zeros_like(hidden_states)
    routed = top_k_index[:num_real]
    for expert in torch.unique(routed).tolist():
        if expert >= module.num_experts:  # type: ignore[operator]  # "nobody" of expert parallelism
            continue
        rows, slots = torch.where(routed == expert)
        for at in range(0, len(rows), rows_per_call):
            part = rows[at : at + rows_per_call]
            inputs = hidden_states.new_zeros((rows_per_call, hidden_states.shape[1]))
            inputs[: len(part)] = hidden_states[part]
            weights = top_k_weights[part, slots[at : at + rows_per_call], None]
            outputs = _run_expert(module, expert, inputs)[: len(part)] * weights
            result.index_add_(0, part, outputs.to(result.dtype))
    return result


def _run_expert(module: torch.nn.Module, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _project(module, up_name, expert, inputs)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)  # type: ignore[operator]
    output = _project(module, "down_proj", expert, hidden)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)  # type: ignore[operator]
    return output


def _project(module: torch.nn.Module, name: str, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(inputs, weight.T if module.is_transposed else weight, bias)

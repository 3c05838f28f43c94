"""Llama 4's mixture, whose experts do not go through transformers' ``ExpertsInterface``.

Its block hands every row to every expert, scaled by the router's scores, which are 0 but for one expert: as many times
the activations and the weights as are needed. Here a row goes to its one expert, scaled as there; a scaled row of zeros
comes out of an expert as zeros, so nothing that counts is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from layerstream.model.experts import compute_experts


def adapt(model: Any) -> None:
    """Have the mixtures of *model*, a Llama 4, compute what their rows are routed to alone."""
    for module in model.modules():
        if isinstance(module, Llama4TextMoe) and module.top_k == 1:
            _adapt(module, model.config)


def _adapt(block: Llama4TextMoe, config: Any) -> None:
    experts: Any = block.experts
    experts.config = config
    experts.has_gate = experts.is_transposed = experts.is_concatenated = True
    experts.has_bias = experts.has_post_expert_norm = experts._is_expert_parallel = False
    experts._apply_gate = lambda gate_up: _default_apply_gate(experts, gate_up)

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(hidden)
        index = logits.argmax(dim=1, keepdim=True)
        scaled = hidden * scores.gather(1, index)
        routed = compute_experts(experts, scaled, index, torch.ones_like(scaled[:, :1]))
        return block.shared_expert(hidden) + routed, logits

    block.forward = forward  # type: ignore[method-assign]

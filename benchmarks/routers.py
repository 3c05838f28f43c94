"""Routers that send rows where they are to go: anywhere, or by Zipf's law.

A router's logit for an expert is a product with the normed hidden state *x*. With *m* the mean of *x* over text, the
part of *x* beside *m* gives every expert a random number that differs from token to token, and the part along *m* gives
it one that hardly does: ``r·(x - m) - s ln(rank)`` sends rows to the *i*-th most popular expert about ``i ** -s`` times
as often as to the first. With s = 0 nothing can be foreseen: the worst case for a cache.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

GUMBEL_DEVIATION = math.pi / math.sqrt(6)  # of the noise with which the largest k are a draw by weights
TEXT = Path(__file__).resolve().parents[1] / "engine" / "layerstream" / "demo" / "documents"
TOKENS = 1024


class Routers:
    """Weights of the routers of a mixture that is made out of *reader*."""

    def __init__(self, reader: Path, num_experts: int, skew: float) -> None:
        self._num_experts = num_experts
        self._skew = skew
        self._seen = _normed_states(reader)

    def weights(self, layer: int) -> torch.Tensor:
        """``(experts, hidden size of the reader)`` in fp32."""
        seen = self._seen[min(layer, len(self._seen) - 1)]
        random = torch.Generator().manual_seed(1000 + layer)
        mean = seen.mean(0)
        along = mean / mean.square().sum()  # times the mean: 1
        noise = torch.randn(self._num_experts, len(mean), generator=random)
        noise -= (noise @ mean)[:, None] * along
        noise *= GUMBEL_DEVIATION / (noise @ (seen - mean).T).std()
        ranks = torch.randperm(self._num_experts, generator=random) + 1
        return noise - self._skew * ranks.log()[:, None] * along


def _normed_states(reader: Path) -> list[torch.Tensor]:
    """What the MLPs of the reader's layers are given, and what one after them would be, ``(tokens, hidden)`` each."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(reader, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(reader)
    text = "\n\n".join(file.read_text("utf-8") for file in sorted(TEXT.glob("*.md")) + sorted(TEXT.glob("*.txt")))
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS).input_ids
    found: list[torch.Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, output: found.append(output[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        last = model.model(ids, output_hidden_states=True).hidden_states[-1][0]
    for hook in hooks:
        hook.remove()
    found.append(last / model.model.norm.weight.detach())  # as an added layer's norm of ones has it
    return found

"""Experts give a row the same bits whatever else is in the sweep, however the rows are cut into row blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.model import elementwise
from layerstream.model.context import SweepContext, sweeping
from layerstream.model.experts import Matrices, compute_experts
from layerstream.model.routing import gathering
from layerstream.streaming.experts.bank import Wish
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

NUM_EXPERTS, TOP_K, HIDDEN = 5, 2, 48


class AllThere:
    """Experts that come as they are routed to, from memory."""

    def __init__(self, module: Qwen3MoeExperts) -> None:
        self._module = module

    def divide(self, wish: Wish) -> frozenset[int]:
        return frozenset()

    def bring(
        self, wish: Wish, on_host: frozenset[int], may_skip: Callable[[], bool]
    ) -> Iterator[tuple[int, Matrices]]:
        for expert in wish.experts:
            yield expert, {name: getattr(self._module, name)[expert] for name in ("gate_up_proj", "down_proj")}


def make_experts() -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=36, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
    )
    module = Qwen3MoeExperts(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    elementwise.install(module)
    module.routed = AllThere(module)  # type: ignore[assignment]
    return module


EXPERTS = make_experts()


def answer(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """What the experts give *rows*, computed in one sweep as row blocks of *sizes*."""
    hidden = rows[:, :HIDDEN]
    index = rows[:, HIDDEN:].topk(TOP_K).indices
    weights = rows[:, HIDDEN:].softmax(-1).gather(1, index)
    blocks = [RowBlock((Span(Sequence(0, [1] * size, size, SamplingParams()), 0, size),), size) for size in sizes]
    with torch.inference_mode(), sweeping(SweepContext(Sweep(tuple(blocks), ()), [], [])) as context:

        def forward(at: slice) -> torch.Tensor:
            return compute_experts(EXPERTS, hidden[at], index[at], weights[at])

        if context.is_single_block:
            return forward(slice(0, len(rows)))
        with gathering(forward, context.row_blocks):
            return torch.cat([forward(at) for at in context.row_blocks()])


@settings(max_examples=12)
@given(st.lists(st.sampled_from([1, 1, 2, 3, 16, 17, 32, 33]), min_size=2, max_size=4), st.integers(0, 2**16))
def test_row_blocks_alone_and_together(sizes: list[int], seed: int) -> None:
    rows = torch.randn((sum(sizes), HIDDEN + NUM_EXPERTS), generator=torch.Generator().manual_seed(seed))
    together = answer(rows, sizes)
    alone = torch.cat([answer(block, [len(block)]) for block in rows.split(sizes)])
    assert torch.equal(together, alone)
    backwards = answer(torch.cat(rows.split(sizes)[::-1]), sizes[::-1])
    assert torch.equal(together, torch.cat(backwards.split(sizes[::-1])[::-1]))

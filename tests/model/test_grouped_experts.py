"""On a device experts that are all there are computed at once: as few operators however many there are, and the same
bits for a row whatever the others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.errors import InvalidRouting
from layerstream.model import grouped_experts
from layerstream.model.context import SweepContext, sweeping
from layerstream.model.experts import compute_experts
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tests.launches import Launches
from tests.pretend import PretendCuda, pretend_cuda

NUM_EXPERTS, TOP_K, HIDDEN = 8, 2, 64


def qwen(num_experts: int = NUM_EXPERTS) -> torch.nn.Module:
    return Qwen3MoeExperts(
        Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=32, num_experts=num_experts, num_experts_per_tok=TOP_K)
    )


def gpt_oss(num_experts: int = NUM_EXPERTS) -> torch.nn.Module:
    """With biases, and matrices whose rows and columns are exchanged."""
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=32, num_local_experts=num_experts)
    return GptOssExperts(config)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    grouped_experts._agrees.clear()
    with pretend_cuda(monkeypatch) as device, device.use(), torch.inference_mode():
        yield device
    grouped_experts._agrees.clear()


def filled(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) / 8
        module.register_parameter(name, None)
        delattr(module, name)
        setattr(module, name, values.to(torch.bfloat16).to(device))
    return module


def asked(num_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((num_rows, HIDDEN), generator=generator).to(torch.bfloat16)
    scores = torch.randn((num_rows, NUM_EXPERTS), generator=generator)
    weights, index = scores.softmax(-1).topk(TOP_K)
    return hidden, index, weights.to(torch.bfloat16)


def answer(
    module: torch.nn.Module, rows: tuple[torch.Tensor, ...], num_used: int, device: torch.device
) -> tuple[torch.Tensor, SweepContext]:
    sequence = Sequence(0, [1] * num_used, num_used, SamplingParams())
    block = RowBlock((Span(sequence, 0, num_used),), len(rows[0]))
    with sweeping(SweepContext(Sweep((block,), ()), [], [])) as context:
        return compute_experts(module, *(tensor.to(device) for tensor in rows)).cpu(), context


@pytest.mark.parametrize("make", [qwen, gpt_oss])
@pytest.mark.parametrize("num_rows", [32, 131, 200])
def test_they_give_what_they_give_one_by_one(
    num_rows: int, make: Callable[[], torch.nn.Module], card: PretendCuda
) -> None:
    rows = asked(num_rows)
    found, context = answer(filled(make(), card.torch_device), rows, num_rows, card.torch_device)
    assert len(context.routed) == 1
    expected, context = answer(filled(make(), torch.device("cpu")), rows, num_rows, torch.device("cpu"))
    assert not context.routed
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    grouped_experts.check(context.routed)


@pytest.mark.parametrize("make", [qwen, gpt_oss])
def test_rows_alone_and_among_neighbours(make: Callable[[], torch.nn.Module], card: PretendCuda) -> None:
    module, (hidden, index, weights) = filled(make(), card.torch_device), asked(32)
    together, _ = answer(module, (hidden, index, weights), 32, card.torch_device)
    for row in (0, 7, 31):
        others = asked(32, seed=row + 1)
        mixed = tuple(
            torch.cat([own[row : row + 1], other[1:]])
            for own, other in zip((hidden, index, weights), others, strict=True)
        )
        alone, _ = answer(module, mixed, 1, card.torch_device)
        assert torch.equal(alone[0], together[row])
        assert not alone[1:].any(), "padding is nobody's"


def test_operators_for_a_layer(card: PretendCuda) -> None:
    found = set()
    for num_experts in (8, 64):
        module = filled(qwen(num_experts), card.torch_device)
        for num_rows in (1, 8, 32, 128):
            rows = tuple(tensor.to(card.torch_device) for tensor in asked(num_rows))
            answer(module, rows, num_rows, card.torch_device)  # constants are made, the kernel is tried
            with Launches() as launches:
                answer(module, rows, num_rows, card.torch_device)
            of_processor = ("aten.pad.default", "aten.contiguous.default", "aten.clone.default")  # vectors; crossing
            found.add(launches.total - sum(launches.by_name[name] for name in of_processor))
            assert launches.by_name["pretended_bits.grouped_mm.default"] == 2
    assert found == {15}


@pytest.mark.parametrize("index", [NUM_EXPERTS, NUM_EXPERTS + 1, 100, -2])
def test_a_router_that_names_nobody_is_found_out_in_the_end(index: int, card: PretendCuda) -> None:
    hidden, chosen, weights = asked(8)
    chosen[3, 1] = index
    _, context = answer(filled(qwen(), card.torch_device), (hidden, chosen, weights), 8, card.torch_device)
    with pytest.raises(InvalidRouting, match=rf"to expert {index}, and there are {NUM_EXPERTS}"):
        grouped_experts.check(context.routed)


def _wrong(inputs: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return inputs.new_zeros((len(inputs), weights.shape[2]))


def _by_neighbours(inputs: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    found = torch.ops.pretended_bits.grouped_mm(inputs, weights, ends)
    return found * (1 + ends[-1] / 1000)


def _absent(inputs: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel for this device")


@pytest.mark.parametrize("kernel", [_wrong, _by_neighbours, _absent])
def test_a_kernel_that_does_otherwise_is_not_used(
    kernel: Callable[..., torch.Tensor], card: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_experts, "multiply", kernel)
    rows = asked(32)
    found, context = answer(filled(qwen(), card.torch_device), rows, 32, card.torch_device)
    expected, _ = answer(filled(qwen(), torch.device("cpu")), rows, 32, torch.device("cpu"))
    assert not context.routed
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

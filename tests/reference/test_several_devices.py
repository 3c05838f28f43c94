"""Layers on several pretended devices: no operation has tensors of two of them, every copy is late, each keeps to its
ceiling, and tokens and logits are those of plain transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from layerstream.setup.assembly import assemble
from layerstream.setup.plan_model import plan_model
from layerstream.setup.stepping import step_greedily

from tests.harness import (
    NEW_TOKENS,
    STREAMING,
    Run,
    add_tokenizer,
    assert_equals,
    devices_config,
    draw_prompt,
    run_greedily,
)
from tests.models import FAMILIES, make_model
from tests.pretend import PretendCuda, pretend_cudas

PROMPT_LENGTHS = (150, 5, 67)
TOLERANCE = 1e-4
SIZES = {"num_hidden_layers": 8, "intermediate_size": 256, "moe_intermediate_size": 96}


@pytest.fixture(autouse=True)
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PretendCuda]]:
    """Three devices instead of one."""
    with pretend_cudas(monkeypatch, 3) as devices:
        yield devices


@pytest.mark.parametrize(
    ("family", "mode", "device_map", "count"),
    [
        *(("llama", mode, "auto", 2) for mode in ("resident", "host", "disk", "cut")),
        ("llama", "host", "balanced", 3),
        ("llama", "cut", "sequential", 2),
        *(pytest.param("llama", mode, "balanced", 3, marks=pytest.mark.slow) for mode in ("resident", "disk")),
        *(pytest.param("llama", mode, "sequential", 2, marks=pytest.mark.slow) for mode in ("resident", "host")),
        ("llama", "host", "auto", 1),
        *((family, "host", "auto", 2) for family in ("gemma3", "gpt-oss", "deepseek-v3", "llama-tied")),
        ("llama4-text", "resident", "auto", 2),
        *(("qwen3_5_text", mode, "balanced", 2) for mode in ("resident", "host")),
        ("gemma4-text-inputs", "host", "balanced", 2),  # layers of the second read what the first one keeps
        *((family, "disk", "balanced", 2) for family in ("cohere2", "qwen3-moe", "smollm3")),
        *(pytest.param(family, "disk", "balanced", 2, marks=pytest.mark.families) for family in ("gpt-neox", "phi")),
    ],
)
def test_equals_plain_transformers(
    family: str,
    mode: str,
    device_map: str,
    count: int,
    tmp_path: Path,
    tokenizer_folder: Path,
    pretended_cuda: list[PretendCuda],
) -> None:
    changes = FAMILIES[family].changes
    fixed = {*changes, *(["num_hidden_layers"] if "layer_types" in changes else [])}
    sizes = {name: size for name, size in SIZES.items() if name not in fixed}
    reference = make_model(family, tmp_path, sizes=sizes)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    config = devices_config(tmp_path, mode, device_map, count)
    plan = plan_model(config)[0]
    assert plan.streams == (f"device-{mode}" in STREAMING)
    assert (plan.disk_bytes > 0) == (mode in {"disk", "cut"})
    assert len(plan.parts) == (1 if (mode, device_map) == ("resident", "sequential") else count)
    assert plan.takes_turns == (device_map == "auto" and mode != "resident" and count > 1)
    run = run_greedily(config, prompts)
    assert_equals(run, reference, prompts, TOLERANCE)
    for number, part in zip(plan.devices, plan.parts, strict=True):
        device = pretended_cuda[number]
        assert 0 < device.most_bytes <= part.budget_bytes == device.ceiling
    assert not any(device.pinned for device in pretended_cuda), "host memory was left pinned"


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_experts_come_as_they_are_routed_to(
    device_map: str, tmp_path: Path, tokenizer_folder: Path, pretended_cuda: list[PretendCuda]
) -> None:
    """Each device has slots for the experts of its own layers, and host memory behind them."""
    reference = make_model("qwen3-moe", tmp_path, sizes=SIZES)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    config = devices_config(tmp_path, "cut", device_map, 2)
    parts = assemble(config, None)
    try:
        plan, banks = parts.plan, parts.weights.banks
        assert [part.weights.expert_slots > 0 for part in plan.parts] == [True, True]
        assert sum(bank.cache.num_experts for bank in banks) == plan.facts.num_experts
        assert sum(part.weights.host_expert_slots for part in plan.parts) <= plan.weights.host_expert_slots
        run = Run(*step_greedily(parts, prompts, NEW_TOKENS), plan.streams)
        for bank in banks:
            bank.check_integrity()
            assert bank.cache.hits + bank.cache.misses > 0
        shares = parts.weights.expert_shares()
        assert len(shares) == plan.facts.num_experts
        assert sum(share > 0 for share in shares) == sum((bank.cache.shares() > 0).sum() for bank in banks)
    finally:
        parts.close()
    assert_equals(run, reference, prompts, TOLERANCE)
    for number, part in zip(plan.devices, plan.parts, strict=True):
        assert pretended_cuda[number].most_bytes <= part.budget_bytes
    assert not any(device.pinned for device in pretended_cuda)


def test_devices_of_different_sizes(tmp_path: Path, tokenizer_folder: Path, pretended_cuda: list[PretendCuda]) -> None:
    reference = make_model("llama", tmp_path, sizes=SIZES)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    small = devices_config(tmp_path, "cut", "auto", 3)
    sizes = small.memory_each[0] + 300_000, small.memory_each[1], small.memory_each[2] + 150_000
    for device_map in ("auto", "balanced", "sequential"):
        gc.collect()  # the engine before
        for device in pretended_cuda:
            device.most_bytes = device.live_bytes
        config = replace(devices_config(tmp_path, "host", device_map, 3), memory_each=sizes)
        plan = plan_model(config)[0]
        assert_equals(run_greedily(config, prompts), reference, prompts, TOLERANCE)
        assert device_map == "auto" or plan.layers.count(0) >= plan.layers.count(1)
        for device, size in zip(pretended_cuda, sizes, strict=True):
            assert device.most_bytes <= size

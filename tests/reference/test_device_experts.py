"""Experts behind an accelerator: plain transformers' logits, wherever they are and whoever computes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from layerstream import LayerStream
from layerstream.errors import BudgetTooSmall, ConfigurationError
from layerstream.model.expert_usage import VARIABLE
from layerstream.planner import on_host
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import plan_facts, plan_model, spend
from layerstream.setup.stepping import step_greedily
from layerstream.streaming.experts.device_bank import DeviceBank
from layerstream.streaming.experts.paths import ExpertPaths

from tests.crossing import by_turns
from tests.harness import add_tokenizer, assert_equals, draw_prompt, lose_an_expert, run_greedily
from tests.models import make_model
from tests.pretend import PretendCuda

TOLERANCE = 1e-4
FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "glm4-moe", "deepseek-v3", "llama4-text")
LENGTHS = (150, 5, 67, 21)


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory there is."""
    monkeypatch.setattr(on_host, "_resident_plan", lambda *_, **__: None)


def config_with_slots(folder: Path, num_slots: int, num_host_slots: int, **options) -> EngineConfig:
    """The smallest budgets with room for *num_slots* experts on the device and *num_host_slots* behind it, at the
    least."""
    config = EngineConfig(str(folder), device="cuda", dtype="float32", host_memory_bytes=2**30, memory_bytes=1)
    config = dataclasses.replace(config, **options)
    facts = plan_facts(config)[0]
    with pytest.raises(BudgetTooSmall) as error:
        spend(config, facts)
    config = dataclasses.replace(config, memory_bytes=error.value.required_bytes)
    while (plan := spend(config, facts)).weights.expert_slots < min(num_slots, facts.num_experts):
        assert config.memory_bytes is not None
        config = dataclasses.replace(config, memory_bytes=config.memory_bytes + plan.weights.slot_bytes)
    slot_bytes = plan.weights.slot_bytes
    num_host_slots = min(num_host_slots, facts.num_experts - plan.weights.expert_slots)
    with pytest.raises(BudgetTooSmall) as error:
        spend(dataclasses.replace(config, host_memory_bytes=1), facts)
    config = dataclasses.replace(config, host_memory_bytes=error.value.required_bytes)
    while spend(config, facts).weights.host_expert_slots < num_host_slots:
        assert config.host_memory_bytes is not None
        config = dataclasses.replace(config, host_memory_bytes=config.host_memory_bytes + slot_bytes)
    return config


def prepare(family: str, folder: Path, tokenizer_folder: Path, **sizes):
    reference = make_model(family, folder, sizes=sizes)
    add_tokenizer(folder, tokenizer_folder)
    return reference


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param((1, 1), id="one", marks=pytest.mark.slow),
        pytest.param((5, 3), id="some"),
        pytest.param((9, 200), id="all behind it", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("family", "host_compute"), by_turns(FAMILIES, ("auto", "off")))
def test_equals_plain_transformers(
    family: str, slots: tuple[int, int], host_compute: str, tmp_path: Path, tokenizer_folder: Path, pretended_cuda
) -> None:
    reference = prepare(family, tmp_path, tokenizer_folder)
    config = config_with_slots(tmp_path, *slots, host_compute=host_compute)
    prompts = [draw_prompt(length) for length in LENGTHS]
    parts = assemble(config, None)
    try:
        tokens, logits = step_greedily(parts, prompts, 6)
        bank = parts.weights.banks[0]
        assert isinstance(bank, DeviceBank)
        bank.check_integrity()
        if host_compute == "off" or slots[0] == 1:
            assert (bank.num_computed_on_host > 0) == (host_compute == "auto")
    finally:
        parts.close()
    for prompt, given, found in zip(prompts, tokens, logits, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + given]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert (found - expected).abs().max() / expected.abs().max() <= TOLERANCE
        assert given == expected.argmax(-1).tolist()
    assert pretended_cuda.peak_bytes() <= config.memory_bytes
    assert not pretended_cuda.pinned, "host memory was left pinned"


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["all cross", "all stay"])
def test_both_ways_give_the_same(
    share: float, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = prepare("qwen3-moe", tmp_path, tokenizer_folder)
    monkeypatch.setattr(ExpertPaths, "choose", lambda self, rows, most_rows: list(range(int(share * len(rows)))))
    prompts = [draw_prompt(length) for length in LENGTHS]
    assert_equals(run_greedily(config_with_slots(tmp_path, 4, 6), prompts), reference, prompts, TOLERANCE)


def test_both_ways_are_called_alike(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended device has the processor's kernels: where the shapes of calls are equal, so are the bits."""
    prepare("qwen3-moe", tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in (33, 5)]
    runs = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(
            ExpertPaths, "choose", lambda _, rows, most_rows, part=share: list(range(int(part * len(rows))))
        )
        runs.append(run_greedily(config_with_slots(tmp_path, 1, 6), prompts))
    for crossed, stayed in zip(runs[0].logits, runs[1].logits, strict=True):
        assert torch.equal(crossed, stayed)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["all cross", "all stay"])
def test_the_ceiling_holds(
    share: float,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pretended_cuda: PretendCuda,
) -> None:
    """Every tensor that the device holds is counted, those of an instant as well."""
    monkeypatch.setattr(ExpertPaths, "choose", lambda self, rows, most_rows: list(range(int(share * len(rows)))))
    prepare("qwen3-moe", tmp_path, tokenizer_folder, num_experts=16, num_experts_per_tok=4)
    config = config_with_slots(tmp_path, 6, 10)
    run_greedily(config, [draw_prompt(length) for length in (300, 40, 7, 90)])
    assert config.memory_bytes is not None
    assert 0 < pretended_cuda.most_bytes <= config.memory_bytes


def test_who_needs_a_lost_expert_fails_and_nobody_else(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("qwen3-moe", tmp_path, tokenizer_folder, num_experts=32, num_experts_per_tok=1)
    config = config_with_slots(tmp_path, 1, 1)
    options = {"memory": config.memory_bytes, "host_memory": config.host_memory_bytes, "dtype": "float32"}
    with LayerStream(tmp_path, device="cuda", speculation="off", kv_store=None, progress=False, **options) as engine:
        lose_an_expert(engine, monkeypatch)
        found = engine.stats().experts
        assert found is not None
        assert found.hits + found.misses > 0
        assert found.device_hits <= found.hits
        assert found.num_slots > found.device_slots


def test_the_second_process_has_the_hot_ones_on_the_device(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "remembered"))
    folder = tmp_path / "model"
    prepare("qwen3-moe", folder, tokenizer_folder, num_experts=16)
    config = config_with_slots(folder, 12, 8)
    hits = []
    for _ in range(2):
        parts = assemble(config, None)
        try:
            step_greedily(parts, [[7, 8, 9]], 8)
            bank = parts.weights.banks[0]
            hits.append(bank.cache.hits / (bank.cache.hits + bank.cache.misses))
        finally:
            parts.close()
    assert hits[1] > hits[0]


def test_the_plan_says_what_is_where(tmp_path: Path, tokenizer_folder: Path) -> None:
    prepare("qwen3-moe", tmp_path, tokenizer_folder, num_experts=16)
    plan = plan_model(config_with_slots(tmp_path, 12, 8))[0]
    assert plan.host is not None
    assert plan.host.expert_bytes == plan.weights.host_expert_slots * plan.weights.slot_bytes
    assert plan.host.planned_bytes <= plan.host.budget_bytes
    assert 0 < plan.expert_read_bytes(1) < plan.expert_link_bytes(1)
    assert "after the device's" in str(plan)
    with pytest.raises(BudgetTooSmall, match="experts on their way"):
        plan_model(dataclasses.replace(config_with_slots(tmp_path, 12, 1), host_memory_bytes=2**14))


def test_host_compute_is_one_of_two() -> None:
    with pytest.raises(ConfigurationError, match="host_compute is 'never'"):
        EngineConfig("model", host_compute="never")

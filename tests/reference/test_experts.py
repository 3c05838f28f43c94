"""Experts that come as they are routed to: plain transformers' logits, with room for one of them or for all."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from layerstream import LayerStream
from layerstream.core.sweep import RowBlock, Sweep
from layerstream.errors import BudgetTooSmall, InvalidRouting, MissingTensor
from layerstream.hardware.reader import DirectReader
from layerstream.model import experts as computing
from layerstream.model.context import SweepContext, sweeping
from layerstream.model.expert_usage import VARIABLE
from layerstream.planner import on_host
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import plan_facts, plan_model, spend
from layerstream.setup.stepping import step_greedily
from layerstream.streaming.experts.bank import ExpertBank
from safetensors.torch import load_file, save_file

from tests.crossing import by_turns
from tests.harness import add_tokenizer, assert_equals, draw_prompt, lose_an_expert, run_greedily
from tests.models import make_model

TOLERANCE = 1e-4
LEAST_SLOTS = {"deepseek-v3": 2}  # attention over latents is not cut: at the very least it would not fit
FAMILIES = (
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "gpt-oss",
    "glm4-moe",
    "granite-moe",
    "olmoe",
    "deepseek-v3",
    "llama4-text",
)
LENGTHS = (150, 5, 67, 21)


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory there is: small models would be resident before there is room for many experts."""
    monkeypatch.setattr(on_host, "_resident_plan", lambda *_, **__: None)


def config_with_slots(folder: Path, num_slots: int, **options) -> EngineConfig:
    """The smallest budget that has room for *num_slots* experts at a time."""
    config = EngineConfig(str(folder), device="cpu", dtype="float32", memory_bytes=1, **options)
    facts = plan_facts(config)[0]
    with pytest.raises(BudgetTooSmall) as error:
        spend(config, facts)
    config = dataclasses.replace(config, memory_bytes=error.value.required_bytes)
    while (plan := spend(config, facts)).weights.expert_slots < num_slots:
        assert config.memory_bytes is not None
        config = dataclasses.replace(config, memory_bytes=config.memory_bytes + plan.weights.slot_bytes)
    return config


@pytest.mark.parametrize(("family", "slots"), by_turns(FAMILIES, ("one",), ("half", "most")))
def test_equals_plain_transformers(family: str, slots: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    reference = make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    count = plan_model(config_with_slots(tmp_path, 1))[0].facts.num_experts
    least = LEAST_SLOTS.get(family, 1)
    config = config_with_slots(tmp_path, {"one": least, "half": count // 2, "most": count - 2}[slots])
    prompts = [draw_prompt(length) for length in LENGTHS]
    assert_equals(run_greedily(config, prompts), reference, prompts, TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 8])
def test_from_one_expert_a_row_to_eight(top_k: int, tmp_path: Path, tokenizer_folder: Path) -> None:
    reference = make_model("qwen3-moe", tmp_path, sizes={"num_experts": 12, "num_experts_per_tok": top_k})
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in LENGTHS]
    assert_equals(run_greedily(config_with_slots(tmp_path, 9), prompts), reference, prompts, TOLERANCE)


def test_experts_that_lie_fused_in_the_files(tmp_path: Path, tokenizer_folder: Path) -> None:
    reference = make_model("mixtral", tmp_path, save_original_format=False)
    add_tokenizer(tmp_path, tokenizer_folder)
    assert any(tensor.dim() == 3 for tensor in load_file(tmp_path / "model.safetensors").values())
    prompts = [draw_prompt(length) for length in LENGTHS]
    assert_equals(run_greedily(config_with_slots(tmp_path, 5), prompts), reference, prompts, TOLERANCE)


@pytest.mark.parametrize(
    ("family", "dtype"), by_turns(["qwen3-moe", "gpt-oss", "deepseek-v3"], ("float32", "bfloat16"))
)
def test_bits_depend_on_nobody(family: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Not on neighbours, not on which experts are in memory, not on which of them come first."""
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    slots = LEAST_SLOTS.get(family, 1), 7
    few, many = (dataclasses.replace(config_with_slots(tmp_path, count), dtype=dtype) for count in slots)
    prompt, others = draw_prompt(45), [draw_prompt(length) for length in (80, 3, 21)]
    alone = run_greedily(few, [prompt])
    among = run_greedily(many, [others[0], prompt, *others[1:]])
    assert torch.equal(alone.logits[0], among.logits[1])
    parts = assemble(many, None)
    try:
        first, again = (step_greedily(parts, [prompt], 6)[1] for _ in range(2))
    finally:
        parts.close()
    assert torch.equal(first[0], alone.logits[0])
    assert torch.equal(again[0], alone.logits[0])


def test_a_sweep_reads_an_expert_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Whatever the number of row blocks: a prompt of several, and decoding neighbours."""
    make_model("qwen3-moe", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    parts = assemble(config_with_slots(tmp_path, 1), None)
    try:
        cache = parts.weights.banks[0].cache
        step_greedily(parts, [draw_prompt(90), draw_prompt(70)], 1)
        asked = cache.hits + cache.misses
        assert parts.step.num_sweeps >= 2
        assert asked <= parts.step.num_sweeps * parts.plan.facts.num_experts
    finally:
        parts.close()


def test_who_needs_a_lost_expert_fails_and_nobody_else(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("qwen3-moe", tmp_path, sizes={"num_experts": 32, "num_experts_per_tok": 1})
    add_tokenizer(tmp_path, tokenizer_folder)
    config = config_with_slots(tmp_path, 1)
    options = {"memory": config.memory_bytes, "dtype": "float32", "device": "cpu", "kv_store": None, "progress": False}
    with LayerStream(tmp_path, speculation="off", **options) as engine:
        lose_an_expert(engine, monkeypatch)


def test_the_second_process_starts_warm(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "remembered"))
    folder = tmp_path / "model"
    make_model("qwen3-moe", folder, sizes={"num_experts": 16})
    add_tokenizer(folder, tokenizer_folder)
    config = config_with_slots(folder, 20)
    hits = []
    for _ in range(2):
        parts = assemble(config, None)
        try:
            cache = parts.weights.banks[0].cache
            step_greedily(parts, [[7, 8, 9]], 8)
            hits.append(cache.hits / (cache.hits + cache.misses))
        finally:
            parts.close()
    assert hits[1] > hits[0]
    (file,) = (tmp_path / "remembered").iterdir()
    shares = plan_model(config)[0].facts.expert_shares
    assert len(shares) == 48
    assert sum(shares) > 0
    changes = (_changed(file, model="another"), _changed(file, shares=[1.0] * 47), _changed(file, shares=[-1.0] * 48))
    for damage in ("", "[]", '{"model": 3}', file.read_text()[:-20], *changes):
        file.write_text(damage)
        assert plan_model(config)[0].facts.expert_shares == ()
    os.utime(folder / "model.safetensors", ns=(1, 1))  # other weights under the same name
    assert plan_model(config)[0].facts.expert_shares == ()


def _changed(file: Path, **changes) -> str:
    return json.dumps(json.loads(file.read_text()) | changes)


def test_a_folder_that_cannot_be_written_costs_nothing_but_warmth(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "below"))
    folder = tmp_path / "model"
    reference = make_model("mixtral", folder)
    add_tokenizer(folder, tokenizer_folder)
    prompts = [draw_prompt(9)]
    assert_equals(run_greedily(config_with_slots(folder, 3), prompts), reference, prompts, TOLERANCE)


def test_too_little_for_one_expert_says_the_minimum(tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model("mixtral", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    config = config_with_slots(tmp_path, 1)
    assert config.memory_bytes is not None
    with pytest.raises(BudgetTooSmall, match=r"and an expert \d.*pass memory=") as error:
        plan_model(dataclasses.replace(config, memory_bytes=config.memory_bytes - 4096))
    assert error.value.required_bytes == config.memory_bytes


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    for name in [name for name in stored if ".layers.1." in name and "experts" in name]:
        del stored[name]
    save_file(stored, path)
    with pytest.raises(MissingTensor, match=r"layers\.1\.mlp\.experts"):
        plan_model(EngineConfig(str(tmp_path), memory_bytes=2**20))


@pytest.mark.parametrize("index", [4, 9, -2])
def test_a_router_that_names_nobody_is_an_error(index: int) -> None:
    class Experts(torch.nn.Module):
        num_experts = 4

    with sweeping(SweepContext(Sweep((), ()), [], [])) as context:
        context.active = [(0, _Block((), 2))]
        with pytest.raises(InvalidRouting, match=r"there are 4"):
            computing.compute_experts(Experts(), torch.zeros(2, 8), torch.tensor([[0], [index]]), torch.ones(2, 1))


class _Block(RowBlock):
    """Rows of nobody that are no padding."""

    num_padding = 0  # type: ignore[assignment]


def test_reads_go_on_while_experts_compute(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer's experts several are on their way at a time, not one after the other."""
    make_model("qwen3-moe", tmp_path, sizes={"num_experts": 16, "num_experts_per_tok": 8})
    add_tokenizer(tmp_path, tokenizer_folder)
    parts = assemble(config_with_slots(tmp_path, 8), None)
    submitted: list[int] = []
    submit, take = DirectReader.submit, ExpertBank.take

    def counted(reader: DirectReader, *args, **kwargs) -> None:
        submitted.append(len(submitted))
        submit(reader, *args, **kwargs)

    most = 0

    def noted(bank: ExpertBank, expert: int) -> torch.Tensor:
        nonlocal most
        most = max(most, len(bank._reading))
        return take(bank, expert)

    monkeypatch.setattr(DirectReader, "submit", counted)
    monkeypatch.setattr(ExpertBank, "take", noted)
    try:
        step_greedily(parts, [[7, 8, 9]], 4)
    finally:
        parts.close()
    assert submitted
    assert most >= 2

"""Runs small models through the engine's parts, step by step, with every logit in sight."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream import LayerStream, SamplingParams
from layerstream.errors import BudgetTooSmall, ReadError
from layerstream.model.skeleton import build_skeleton
from layerstream.planner import ModelFacts, on_host, units
from layerstream.planner import facts as assumed
from layerstream.planner.states import least_state_bytes
from layerstream.scheduling.composing import Drafting
from layerstream.setup import plan_model as sizing
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import model_facts
from layerstream.setup.stepping import step_greedily
from layerstream.streaming.experts.bank import ExpertBank, ExpertLost

from tests.models import VOCAB_SIZE

NEW_TOKENS = 6
PAGE_TOKENS = 8  # as shrink_units sets it; 32 with recurrent layers, and on devices
SNAPSHOT_SLOTS = 8  # states of recurrent layers beside the two that the least budget has room for
STREAMING = {"layers", "cut", "device-host", "device-disk", "device-cut"}
"""Modes in which weights stream."""


def shrink_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and stream models of a few hundred kilobytes as if they were large."""
    monkeypatch.setattr(units, "PIN_BELOW", 0)
    monkeypatch.setattr(units, "UNIT_OVERHEAD", 4 * units.PAGE)
    monkeypatch.setattr(on_host, "FINEST_UNIT_BYTES", 12 * 1024)
    monkeypatch.setattr(assumed, "PAGE_CHOICES", (PAGE_TOKENS,))
    monkeypatch.setattr(assumed, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(assumed, "ALONE_CHUNK_TOKENS", 32)
    monkeypatch.setattr(assumed, "DEVICE_CHUNK_TOKENS", 32)
    monkeypatch.setattr(assumed, "RECURRENT_CHUNK_TOKENS", 32)
    monkeypatch.setattr(assumed, "PROMPT_ROWS", 64)
    monkeypatch.setattr(on_host, "MIN_KV_TOKENS", 512)
    monkeypatch.setattr(assumed, "MAX_SWEEP_TOKENS", 96)


def budget_for(folder: Path, mode: str, dtype: str = "float32") -> int:
    """A budget under which the model is resident with all it could wish for, just resident (``"tight"``), streams by
    layers, or is cut as fine as it gets."""
    facts = model_facts(build_skeleton(folder, dtype=dtype), 1024)
    least = _least_bytes(facts)
    if mode == "resident":
        return on_host.comfortable_bytes(facts)
    if mode == "cut":
        return _cut_bytes(facts, least)
    resident = _resident_bytes(facts)
    if mode == "tight":
        return resident + facts.embedding_bytes
    return min(least + facts.compute_bytes // 2, resident - 1)


def _least_bytes(facts: ModelFacts) -> int:
    """What streaming takes at the least."""
    with pytest.raises(BudgetTooSmall) as error:
        on_host._streaming_plan(facts, 1)
    return error.value.required_bytes


def _cut_bytes(facts: ModelFacts, least: int) -> int:
    """Little more than the *least*; slots for several sequences and snapshots, once sweeps and guesses have theirs."""
    if not facts.state_bytes:
        return least + 2048
    cut = replace(facts, is_cut=True, chunk_tokens=facts.streaming_chunk_tokens)
    rows = on_host._activation_bytes(cut, cut.sweep_tokens) - on_host._activation_bytes(cut, cut.prompt_rows)
    wanted = int((least + rows + SNAPSHOT_SLOTS * facts.state_bytes) / (1 - on_host.DRAFT_SHARE))
    return min(wanted, _resident_bytes(facts) - 1)


def _resident_bytes(facts: ModelFacts) -> int:
    """From there on all weights may stay, the embedding's rows coming from disk."""
    fixed = on_host._activation_bytes(facts, facts.sweep_tokens) + facts.decode_bytes
    kept = on_host.MIN_KV_TOKENS * facts.kv_cost_bytes + least_state_bytes(facts)
    return fixed + facts.compute_bytes - facts.embedding_bytes + kept


def add_tokenizer(folder: Path, tokenizer_folder: Path) -> None:
    """Put the tokenizer's files beside the model's."""
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)


def draw_prompt(length: int, seed: int = 7) -> list[int]:
    """Random ordinary token ids."""
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


@dataclass
class Run:
    """Greedy tokens and the logits of every step ``(steps, vocabulary)``, per prompt; whether weights streamed; tokens
    whose KV came from the store, in pages of so many."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    streams: bool
    loaded_tokens: int = 0
    page_tokens: int = 0


def config_for(folder: Path, mode: str, dtype: str = "float32") -> EngineConfig:
    """An engine on the host, see :func:`budget_for`, or, in modes that begin with ``device-``, on a device."""
    if mode.startswith("device-"):
        return device_config(folder, mode.removeprefix("device-"), dtype)
    return EngineConfig(str(folder), device="cpu", memory_bytes=budget_for(folder, mode, dtype), dtype=dtype)


def run_greedily(config: EngineConfig, prompts: list[list[int]], drafting: Drafting | None = None) -> Run:
    """Answer *prompts* together with :data:`NEW_TOKENS` tokens each, with guesses of *drafting*; what they published is
    stored by then, where there is a store."""
    parts = assemble(config, None)
    try:
        run = Run(*step_greedily(parts, prompts, NEW_TOKENS, drafting), parts.plan.streams)
        run.page_tokens = parts.plan.page_tokens
        if parts.store is not None:
            parts.store.flush()
            run.loaded_tokens = parts.store.counters.loaded_tokens
        return run
    finally:
        parts.close()


def assert_equals(run: Run, reference: Any, prompts: list[list[int]], tolerance: float) -> None:
    """Every step's logits are those of *reference* to within *tolerance* of the largest, and its greedy tokens."""
    for prompt, tokens, logits in zip(prompts, run.tokens, run.logits, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        difference = (logits - expected).abs().max() / expected.abs().max()
        assert difference <= tolerance, f"logits differ by {difference:.2e}"
        assert tokens == expected.argmax(-1).tolist()


def device_config(folder: Path, mode: str, dtype: str = "float32", **options: Any) -> EngineConfig:
    """An engine whose weights are all on the device (``"resident"``), cross the link from host memory (``"host"``),
    come from disk by way of it, but for some (``"disk"``), or do so cut as fine as it gets (``"cut"``)."""
    facts = model_facts(build_skeleton(folder, dtype=dtype), 1024, is_on_device=True)
    config = EngineConfig(str(folder), device="cuda", dtype=dtype, **options)
    if mode == "resident":
        return replace(config, memory_bytes=on_host.comfortable_bytes(facts), host_memory_bytes=2**30)
    least = _least_bytes(facts)
    if mode == "cut":
        memory = _cut_bytes(facts, least)
    else:
        memory = min(least + facts.compute_bytes // 3, _resident_bytes(facts) - 1)
    config = replace(config, memory_bytes=memory, host_memory_bytes=2**30)
    if mode == "host":
        return config
    plan = sizing.plan_model(config)[0]
    assert plan.host is not None
    largest = max(unit.ring_bytes for unit in plan.weights.units)
    staying = plan.host.resident_bytes + plan.host.expert_bytes
    least = plan.host.workspace_bytes + plan.host.kv_bytes
    return replace(config, host_memory_bytes=least + 2 * largest + staying // 3)


def devices_config(
    folder: Path, mode: str, device_map: str, count: int, dtype: str = "float32", **options: Any
) -> EngineConfig:
    """As :func:`device_config`, with layers on *count* devices of the same memory."""
    config = EngineConfig(str(folder), device_map=device_map, dtype=dtype, host_memory_bytes=2**30, **options)
    facts = sizing.plan_facts(config)[0]
    if mode == "resident":
        return replace(config, memory_each=(on_host.comfortable_bytes(facts),) * count)
    least, more = _least_each(config, facts, count), 2048 if mode == "cut" else facts.compute_bytes // (4 * count)
    while True:
        config = replace(config, memory_each=(least + more,) * count)
        plan = sizing.spend(config, facts)
        if plan.streams or not more:
            break
        more //= 2
    if mode == "host":
        return config
    assert plan.host is not None
    largest = max(unit.ring_bytes for unit in plan.weights.units)
    least = plan.host.workspace_bytes + plan.host.kv_bytes
    return replace(config, host_memory_bytes=least + 2 * count * largest + plan.host.resident_bytes // 3)


def _least_each(config: EngineConfig, facts: ModelFacts, count: int) -> int:
    """What every one of *count* devices needs at the least."""
    memory = 1
    while True:
        try:
            sizing.spend(replace(config, memory_each=(memory,) * count), facts)
            return memory
        except BudgetTooSmall as error:
            memory = max(memory + 1, error.required_bytes)


def lose_an_expert(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that one of two prompts needs cannot be read: it fails, the other does not, and the next time both have
    what they had alone."""
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    asked: set[int] = set()
    want, take = ExpertBank.want, ExpertBank.take

    def noted(bank: ExpertBank, experts: list[int], shares: list[float]) -> None:
        asked.update(experts)
        want(bank, experts, shares)

    monkeypatch.setattr(ExpertBank, "want", noted)
    used, alone = [], []
    for prompt in ([5, 6], [300, 301, 302]):
        asked.clear()
        alone.append(engine.generate([prompt], params)[0].token_ids)
        used.append(set(asked))
    lost = min(used[0] - used[1])

    def failing(bank: ExpertBank, expert: int) -> torch.Tensor:
        found = take(bank, expert)
        if expert == lost:
            bank.release(expert)
            raise ExpertLost(expert, ReadError("the disk failed here"))
        return found

    monkeypatch.setattr(ExpertBank, "take", failing)
    with engine.gang(2):
        requests = [engine.submit(prompt, params) for prompt in ([5, 6], [300, 301, 302])]
    with pytest.raises(ReadError, match="failed here"):
        requests[0].result()
    assert requests[1].result().token_ids == alone[1]
    monkeypatch.setattr(ExpertBank, "take", take)
    assert engine.generate([[5, 6]], params)[0].token_ids == alone[0]

"""Runs small models through the engine's parts, step by step, with every logit in sight."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream import planner
from layerstream.assembly import EngineConfig, assemble, model_facts
from layerstream.model.skeleton import build_skeleton
from layerstream.self_check import step_greedily
from layerstream.streaming import residency

from tests.models import VOCAB_SIZE

NEW_TOKENS = 6


def shrink_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and stream models of a few hundred kilobytes as if they were large."""
    monkeypatch.setattr(residency, "PIN_BELOW", 0)
    monkeypatch.setattr(residency, "UNIT_OVERHEAD", 4 * residency.PAGE)
    monkeypatch.setattr(planner, "FINEST_UNIT_BYTES", 12 * 1024)
    monkeypatch.setattr(planner, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(planner, "STREAMING_CHUNK_TOKENS", 32)
    monkeypatch.setattr(planner, "PROMPT_ROWS", 64)
    monkeypatch.setattr(planner, "MIN_KV_TOKENS", 512)
    monkeypatch.setattr(planner, "MAX_SWEEP_TOKENS", 96)


def budget_for(folder: Path, mode: str, dtype: str = "float32") -> int:
    """A budget under which the model is resident with all it could wish for, just resident (``"tight"``), streams by
    layers, or is cut as fine as it gets."""
    facts = model_facts(build_skeleton(folder, dtype=dtype), 1024)
    least = planner._floor_bytes(facts) + planner._activation_bytes(facts, planner.MAX_SWEEP_TOKENS)
    if mode == "resident":
        return planner.comfortable_bytes(facts)
    if mode == "cut":
        return least + 2048
    kv_bytes = planner.MIN_KV_TOKENS * facts.kv_token_bytes
    rest = planner._activation_bytes(facts, planner.MAX_SWEEP_TOKENS) + facts.decode_bytes + kv_bytes
    if mode == "tight":
        return rest + facts.compute_bytes
    weights = facts.compute_bytes - facts.embedding_bytes  # its rows may come from disk
    return min(least + weights // 2, rest + weights - 1)


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
    """Greedy tokens and the logits of every step ``(steps, vocabulary)``, per prompt; whether weights streamed."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    streams: bool


def run_greedily(folder: Path, budget: int, prompts: list[list[int]], dtype: str = "float32") -> Run:
    """Answer *prompts* together with :data:`NEW_TOKENS` tokens each."""
    parts = assemble(EngineConfig(str(folder), memory_bytes=budget, dtype=dtype), None)
    try:
        return Run(*step_greedily(parts, prompts, NEW_TOKENS), parts.plan.streams)
    finally:
        parts.reader.close()


def assert_equals(run: Run, reference: Any, prompts: list[list[int]], tolerance: float) -> None:
    """Every step's logits are those of *reference* to within *tolerance* of the largest, and its greedy tokens."""
    for prompt, tokens, logits in zip(prompts, run.tokens, run.logits, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        difference = (logits - expected).abs().max() / expected.abs().max()
        assert difference <= tolerance, f"logits differ by {difference:.2e}"
        assert tokens == expected.argmax(-1).tolist()

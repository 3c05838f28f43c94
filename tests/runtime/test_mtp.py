"""A checkpoint's own multi-token-prediction head drafts: what it says, and that answers do not depend on it."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream import LayerStream, SamplingParams
from layerstream.model.mtp import with_mtp
from layerstream.model.skeleton import build_skeleton
from layerstream.planner import ModelFacts, on_host
from layerstream.runtime import mtp
from layerstream.runtime.mtp import MtpDrafter
from layerstream.setup import plan_model
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import model_facts
from layerstream.setup.stepping import step_greedily

from tests.harness import STREAMING, add_tokenizer, draw_prompt, least_bytes, shrink_units
from tests.heads import Head, change_tensors, make_with_head

FAMILIES = ("glm4-moe", "deepseek-v3")
PROMPT_LENGTHS = (1, 37, 130)
NEW_TOKENS = 6
TOLERANCE = 2e-5


@dataclass
class Said:
    """What a head said in one place."""

    token_ids: list[int]
    first: int
    path: tuple[int, ...]
    logits: torch.Tensor


@dataclass(slots=True)
class Recorded(mtp._Chain):
    """A chain that goes on from whatever comes out, and notes it."""

    notes: list[Said] = field(default_factory=list)

    def learn(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        NOTES.append(Said([*self.sequence.token_ids], self.mirror.first, self.path, logits.clone()))
        super(Recorded, self).learn(logits, hidden)

    def is_worth_more(self, least: float) -> bool:
        return super(Recorded, self).is_worth_more(0.0) and len(self.places) < 3


NOTES: list[Said] = []


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)
    monkeypatch.setattr(mtp, "_Chain", Recorded)
    monkeypatch.setattr(mtp, "LEAST_SHARE", 0.0)
    NOTES.clear()


def make(family: str, folder: Path, tokenizer_folder: Path) -> tuple[Any, Head]:
    model, head = make_with_head(family, folder, num_hidden_layers=12)
    add_tokenizer(folder, tokenizer_folder)
    return model, head


def config_of(folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """An engine whose model and head are resident, or stream by layers."""
    if mode == "resident":
        return EngineConfig(str(folder), device="cpu", memory_bytes=2**28, dtype="float32")
    monkeypatch.setattr(plan_model, "_spend_on_head", lambda _, facts: on_host._streaming_plan(facts, for_head(facts)))
    facts = model_facts(with_mtp(build_skeleton(folder, dtype="float32"), folder), 1024)
    assert facts.mtp is not None
    memory = least_bytes(facts) + facts.compute_bytes // 4 + for_head(facts.mtp)
    return EngineConfig(str(folder), device="cpu", memory_bytes=memory, dtype="float32")


def for_head(facts: ModelFacts) -> int:
    """A budget that a head streams in."""
    return least_bytes(facts) + facts.compute_bytes // 3


def expected(said: Said, model: Any, head: Head) -> torch.Tensor:
    """What the head says there, computed over the whole sequence."""
    tokens = said.token_ids[said.first :]
    with torch.inference_mode():
        given = model.model(torch.tensor([said.token_ids])).last_hidden_state[0, said.first : -1]
        logits, own = head.logits(tokens, given)
        for token in said.path:
            tokens, given = [*tokens, token], torch.cat([given, own[-1:]])
            logits, own = head.logits(tokens, given)
    return logits[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["resident", "layers"])
def test_says_what_plain_modules_say(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model, head = make(family, folder, tokenizer_folder)
    parts = assemble(config_of(folder, mode, monkeypatch), None)
    try:
        assert parts.plan.mtp is not None
        assert parts.plan.streams == parts.plan.mtp.streams == (mode in STREAMING)
        prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
        step_greedily(parts, prompts, NEW_TOKENS, parts.drafting)
    finally:
        parts.close()
    assert {len(said.path) for said in NOTES} == {0, 1, 2}
    assert len(NOTES) > 3 * NEW_TOKENS
    for said in NOTES:
        right = expected(said, model, head)
        assert (said.logits - right).abs().max() <= TOLERANCE * right.abs().max()

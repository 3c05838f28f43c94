"""A checkpoint's own multi-token-prediction head drafts: what it says, and that answers do not depend on it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream import LayerStream, SamplingParams
from layerstream.model.mtp import with_mtp
from layerstream.model.skeleton import build_skeleton
from layerstream.planner import ModelFacts, beside, on_host
from layerstream.runtime import mtp
from layerstream.runtime.mtp import MtpDrafter
from layerstream.scheduling.drafting import pace
from layerstream.setup import plan_model
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import model_facts
from layerstream.setup.stepping import step_greedily
from layerstream.store.config import KVStoreConfig

from tests.harness import _least_bytes, add_tokenizer, draw_prompt, shrink_units
from tests.heads import HEADED, OWN, Head, change_tensors, make_sure_head, make_with_head
from tests.models import FAMILIES
from tests.pretend import pretend_cuda
from tests.quantised import PACKERS

PROMPT_LENGTHS = (1, 37, 130)
NEW_TOKENS = 6
TOLERANCE = 1e-4
DEEP: dict[str, Any] = {"num_hidden_layers": 8}
LAYER_TYPES = ["linear_attention", "linear_attention", "full_attention"]
SPARSE: dict[str, Any] = {**DEEP, "mlp_layer_types": ["dense", *["sparse"] * 7]}
LATENT = {"deepseek_v3", "glm4_moe_lite"}
"""Rows of their sequences are a row block each, so where nothing streams guesses are not worth it."""
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@dataclass
class Said:
    """What a head said in one place."""

    token_ids: list[int]
    first: int
    path: tuple[int, ...]
    logits: torch.Tensor


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[Said]:
    """All that heads say, three tokens ahead whatever comes out."""
    found: list[Said] = []

    class Noted(mtp._Chain):
        def learn(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
            found.append(Said([*self.sequence.token_ids], self.mirror.first, self.path, logits.clone()))
            super().learn(logits, hidden)

        def is_worth_more(self, least: float) -> bool:
            return super().is_worth_more(0.0) and len(self.places) < 3

    monkeypatch.setattr(mtp, "_Chain", Noted)
    monkeypatch.setattr(mtp, "LEAST_SHARE", 0.0)
    return found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Where a model goes; its tokenizer is there."""
    folder = tmp_path / "model"
    folder.mkdir()
    add_tokenizer(folder, tokenizer_folder)
    return folder


def make_deep(family: str, folder: Path) -> tuple[Any, Head]:
    """A model that is much larger than its head, as models are."""
    small = FAMILIES[family]
    sizes = SPARSE if "mlp_layer_types" in small.changes else DEEP
    if small.model_type in OWN:  # dense ones have small layers
        count = 2 if "num_experts" in small.changes else 4
        sizes = {"num_hidden_layers": 3 * count, "layer_types": LAYER_TYPES * count}
    return make_with_head(family, folder, **sizes)


def config_of(folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """An engine whose model and head are resident, or stream by layers; ``"apart"``: with an output projection each."""
    config = EngineConfig(str(folder), device="cpu", memory_bytes=2**28, dtype="float32", allow_untested=True)
    if mode == "resident":
        return config
    monkeypatch.setattr(plan_model, "_spend_on_head", lambda _, facts: on_host._streaming_plan(facts, for_head(facts)))
    if mode == "apart":
        monkeypatch.setattr(beside, "head_stays", lambda plan: False)
    skeleton = with_mtp(build_skeleton(folder, dtype="float32", allow_untested=True), folder)
    facts = model_facts(skeleton, 1024)
    assert facts.mtp is not None
    return replace(config, memory_bytes=_least_bytes(facts) + facts.compute_bytes // 4 + for_head(facts.mtp))


def for_head(facts: ModelFacts) -> int:
    """A budget that a head streams in."""
    return _least_bytes(facts) + facts.compute_bytes // 3


def drafter_of(parts: Assembly) -> MtpDrafter:
    return next(drafter for drafter in parts.drafting._drafters if isinstance(drafter, MtpDrafter))


def assert_right(notes: list[Said], model: Any, head: Head) -> None:
    """Of every sequence, the longest that was guessed from is computed as a whole, by plain modules."""
    assert {len(said.path) for said in notes} == {0, 1, 2}
    longest = {said.token_ids[0]: said.token_ids for said in notes}
    with torch.inference_mode():
        hidden = {first: model.model(torch.tensor([ids])).last_hidden_state[0] for first, ids in longest.items()}
        for said in notes:
            right = expected(said, hidden[said.token_ids[0]], head)
            assert (said.logits - right).abs().max() <= TOLERANCE * right.abs().max()


def expected(said: Said, hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """What the head says there, computed over the whole sequence, whose hidden states begin with *hidden*."""
    tokens = said.token_ids[said.first :]
    given = hidden[said.first : len(said.token_ids) - 1]
    logits, own = head.logits(tokens, given)
    for token in said.path:
        tokens, given = [*tokens, token], torch.cat([given, own[-1:]])
        logits, own = head.logits(tokens, given)
    return logits[-1]


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("glm4-moe", "apart"),
        ("deepseek-v3", "layers"),
        ("qwen3_5", "resident"),
        *(
            pytest.param(family, mode, marks=pytest.mark.families)
            for family in HEADED
            for mode in ("resident", "layers")
        ),
    ],
)
def test_says_what_plain_modules_say(
    family: str, mode: str, folder: Path, notes: list[Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, head = make_with_head(family, folder) if mode == "resident" else make_deep(family, folder)
    config = config_of(folder, mode, monkeypatch)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    parts = assemble(config, None)
    try:
        assert parts.plan.mtp is not None
        assert parts.plan.streams == parts.plan.mtp.streams == (mode != "resident")
        assert parts.plan.mtp.weights.head or mode != "apart"
        drafted = step_greedily(parts, prompts, NEW_TOKENS, parts.drafting)
        drafter_of(parts)._mirrors.check_integrity()
    finally:
        parts.close()
    assert_right(notes, model, head)
    parts = assemble(replace(config, speculation="off"), None)
    try:
        assert parts.plan.mtp is None
        alone = step_greedily(parts, prompts, NEW_TOKENS, parts.drafting)
    finally:
        parts.close()
    assert drafted[0] == alone[0]
    if parts.plan.streams == (mode != "resident"):
        assert all(torch.equal(a, b) for a, b in zip(drafted[1], alone[1], strict=True))


def test_behind_a_stored_prefix_it_knows_what_follows(folder: Path, tmp_path: Path, notes: list[Said]) -> None:
    model, head = make_with_head("glm4-moe", folder)
    store = KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)
    config = EngineConfig(str(folder), device="cpu", memory_bytes=2**28, dtype="float32", kv_store=store)
    answers = []
    for _ in range(2):
        notes.clear()
        parts = assemble(config, None)
        try:
            answers.append(step_greedily(parts, [draw_prompt(130)], NEW_TOKENS, parts.drafting))
            assert parts.store is not None
            parts.store.flush()
        finally:
            parts.close()
        assert_right(notes, model, head)
    assert {said.first for said in notes} == {128}
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1][0], answers[1][1][0])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in {"glm4-moe", "qwen3_next"} else pytest.mark.families)
        for name in HEADED
        if FAMILIES[name].model_type not in LATENT
    ],
)
def test_guesses_that_are_right_save_sweeps(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_ROUNDS", 1000)  # whatever they take
    make_sure_head(family, folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    found = {}
    for speculation in ("auto", "off"):
        with LayerStream(
            folder, device="cpu", dtype="float32", kv_store=None, speculation=speculation, allow_untested=True
        ) as engine:
            answers = [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
            found[speculation] = answers, engine.stats()
    (answers, stats), (alone, without) = found["auto"], found["off"]
    assert answers == alone
    assert without.sweeps >= without.tokens_out
    assert not without.drafters
    assert stats.drafters["mtp"].accepted > stats.drafters["mtp"].drafted // 2
    assert stats.sweeps < without.sweeps // 2


def test_guesses_within_a_pattern(folder: Path) -> None:
    make_sure_head("glm4-moe", folder)
    params = SamplingParams(max_tokens=12, temperature=0, response_format={"type": "regex", "regex": r"[a-z ]{12}"})
    found = []
    for speculation in ("auto", "off"):
        with LayerStream(folder, device="cpu", dtype="float32", kv_store=None, speculation=speculation) as engine:
            found.append(engine.generate([draw_prompt(40), draw_prompt(3)], params))
    assert [answer.token_ids for answer in found[0]] == [answer.token_ids for answer in found[1]]


def test_on_a_device(folder: Path, notes: list[Said], monkeypatch: pytest.MonkeyPatch) -> None:
    model, head = make_with_head("glm4-moe", folder)
    with pretend_cuda(monkeypatch):
        config = EngineConfig(str(folder), device="cuda", memory_bytes=2**30, host_memory_bytes=2**30, dtype="float32")
        parts = assemble(config, None)
        try:
            assert parts.plan.mtp is not None
            step_greedily(parts, [draw_prompt(length) for length in PROMPT_LENGTHS], NEW_TOKENS, parts.drafting)
        finally:
            parts.close()
    assert_right(notes, model, head)


def cut_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.enorm.weight"] = tensors["model.layers.3.enorm.weight"][:-1]


def drop_projection(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.eh_proj.weight"]


def drop_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.mlp.experts.1.down_proj.weight"]


@pytest.mark.parametrize(
    ("damage", "named"),
    [(cut_norm, "embedding_norm"), (drop_projection, "projection"), (drop_an_expert, "down_proj")],
)
def test_a_damaged_head_is_left_out(damage: Any, named: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_with_head("glm4-moe", folder)
    change_tensors(folder, damage)
    with (
        caplog.at_level(logging.WARNING),
        LayerStream(folder, device="cpu", dtype="float32", kv_store=None) as engine,
    ):
        engine.generate(draw_prompt(9), GREEDY)
        assert "mtp" not in engine.stats().drafters
    said = [record.getMessage() for record in caplog.records if "multi-token-prediction" in record.getMessage()]
    assert len(said) == 1
    assert named in said[0]


def test_without_a_head_nothing_is_said_or_planned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_with_head("glm4-moe", folder)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.3." in name]:
            del tensors[name]

    with_head = plan_model.plan_model(EngineConfig(str(folder), device="cpu", memory_bytes=2**28))[0]
    change_tensors(folder, drop)
    plan, skeleton, _ = plan_model.plan_model(EngineConfig(str(folder), device="cpu", memory_bytes=2**28))
    assert with_head.mtp is not None
    assert "prediction head" in str(with_head)
    assert (plan.mtp, skeleton.mtp) == (None, None)
    assert "prediction head" not in str(plan)
    assert not caplog.records


def test_a_head_in_fp8(folder: Path, notes: list[Said]) -> None:
    model, head = make_with_head("glm4-moe", folder)
    pack, quantisation = PACKERS["compressed-fp8"]
    where = "model.layers.3."

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        planes, head.tensors["projection"] = pack(tensors.pop(f"{where}eh_proj.weight"))
        tensors.update({f"{where}eh_proj.{name}": plane for name, plane in planes.items()})
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            planes, values = pack(tensors.pop(f"{where}self_attn.{name}.weight"))
            tensors.update({f"{where}self_attn.{name}.{plane}": tensor for plane, tensor in planes.items()})
            getattr(head.layer.model.layers[0].self_attn, name).weight.data = values

    change_tensors(folder, quantise)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": quantisation}))
    parts = assemble(EngineConfig(str(folder), device="cpu", memory_bytes=2**28, dtype="float32"), None)
    try:
        step_greedily(parts, [draw_prompt(length) for length in PROMPT_LENGTHS], NEW_TOKENS, parts.drafting)
    finally:
        parts.close()
    assert_right(notes, model, head)

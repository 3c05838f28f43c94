"""Weights multiplied as they are stored: near the decoded ones, and a request's bits still do not depend on others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layerstream import LayerStream, SamplingParams
from layerstream.model.device_weights import SAME_INPUT
from layerstream.setup import assembly
from layerstream.setup import plan_model as sizing
from layerstream.setup.config import EngineConfig
from layerstream.setup.pack import pack
from layerstream.setup.plan_model import plan_model
from layerstream.setup.stepping import step_greedily
from layerstream.store.config import KVStoreConfig

from tests.checkpoint.test_tiled import needs_kernel
from tests.gguf_files import Kind, write_gguf
from tests.harness import add_tokenizer, budget_for, config_for, draw_prompt, run_greedily
from tests.models import make_model, make_tokenizer

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FUSED = {"int4": 64, "int8": 16}
TOLERANCE = 0.15  # of the largest logit; decoded to bfloat16 it is 0.03 to 0.09, over three layers of random weights

pytestmark = needs_kernel


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where they are faster."""
    monkeypatch.setattr(sizing, "fused_rows", lambda names: {name: FUSED[name] for name in names})


@pytest.fixture(scope="module", params=["int4", "int8", "Q4_0", "Q4_1"])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Path]:
    """A folder or file of a small Llama, quantised."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = SIZES if "_" not in request.param else {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    reference = make_model("llama", folder / "plain", sizes=sizes)
    if "_" in request.param:
        write_gguf(folder / "model.gguf", reference, "llama", Kind[request.param], make_tokenizer())
        yield folder / "model.gguf"
    else:
        add_tokenizer(folder / "plain", tokenizer_folder)
        pack(folder / "plain", folder / "packed", request.param)
        yield folder / "packed"


@pytest.mark.parametrize("mode", ["tight", "layers"])
def test_bits_do_not_depend_on_neighbours(mode: str, quantised: Path) -> None:
    config = config_for(quantised, mode, "bfloat16")
    prompt = draw_prompt(45)
    others = [draw_prompt(length) for length in (80, 3, 21)]
    alone = run_greedily(config, [prompt])
    among = run_greedily(config, [others[0], prompt, *others[1:]])
    assert torch.equal(alone.logits[0], among.logits[1])
    assert alone.tokens[0] == among.tokens[1]


@pytest.mark.parametrize("mode", ["tight", "layers"])
def test_near_the_decoded_weights(mode: str, quantised: Path) -> None:
    """Narrow row blocks and wide ones, resident and streaming."""
    config = config_for(quantised, mode, "bfloat16")
    prompts = [draw_prompt(length) for length in (70, 200, 5)]
    fused = run_greedily(config, prompts)
    assert fused.streams == (mode == "layers")
    exact = run_greedily(config_for(quantised, "resident"), prompts)
    for own, other in zip(fused.logits, exact.logits, strict=True):
        assert (own[0].float() - other[0]).abs().max() <= TOLERANCE * other[0].abs().max()


def test_stored_context_gives_the_same_bits(quantised: Path, tmp_path: Path) -> None:
    prompt = draw_prompt(140)
    answers = []
    for _ in range(2):
        store = KVStoreConfig(tmp_path / "kv")
        with LayerStream(quantised, dtype="bfloat16", kv_store=store, progress=False, chunk_tokens=64) as engine:
            params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0, logprobs=3)
            answers.append(engine.generate([prompt], params)[0])
    assert answers[1].usage.cached_tokens == 136
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == answers[1].logprobs


def test_the_plan_says_what_was_measured(quantised: Path) -> None:
    plan, skeleton, _ = plan_model(EngineConfig(str(quantised), dtype="bfloat16"))
    assert plan.facts.fused_rows == {name: FUSED[name] for name in skeleton.kernels}
    assert 4 < plan.bits_per_weight < 10
    assert "bits each" in str(plan)
    plain, _, _ = plan_model(EngineConfig(str(quantised), dtype="float32"))
    assert plain.facts.fused_rows == {}, "the kernels compute in bfloat16"


def test_joined_projections_answer_as_separate_ones(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(str(quantised), memory_bytes=budget_for(quantised, "tight", "bfloat16"), dtype="bfloat16")
    found = []
    for names in (SAME_INPUT, ()):
        monkeypatch.setattr("layerstream.model.device_weights.SAME_INPUT", names)
        parts = assembly.assemble(config, None)
        found.append(step_greedily(parts, [draw_prompt(20)], 4)[1][0])
        parts.close()
    assert torch.equal(found[0], found[1])

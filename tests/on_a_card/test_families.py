"""On a real CUDA device: tokens, logits and bits, within budgets that a real allocator can keep.

Its allocator takes memory in blocks of 2 and 20 MiB, and cuBLAS has workspaces of its own: a ceiling is some hundred
MiB, and models are so small that they stream only because their units are cut as if they were large.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream.planner import on_host
from layerstream.setup.config import EngineConfig

from tests.harness import add_tokenizer, assert_equals, device_config, draw_prompt, run_greedily, shrink_units
from tests.models import make_model

pytestmark = [
    pytest.mark.card,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]

FAMILIES = ("llama", "gemma3", "qwen3-moe", "gpt-oss", "deepseek-v3")
LENGTHS = (150, 5, 67)
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
CEILING = 384 * 2**20
MIB = 2**20


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)


def config_for(folder: Path, mode: str, dtype: str) -> EngineConfig:
    """As :func:`tests.harness.device_config`; where everything stays, with a ceiling of some hundred MiB."""
    config = device_config(folder, mode, dtype)
    return replace(config, memory_bytes=CEILING) if mode == "resident" else config


@pytest.mark.parametrize("mode", ["resident", "host", "disk", "cut"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_transformers(family: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    reference = make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in LENGTHS]
    run = run_greedily(config_for(tmp_path, mode, "float32"), prompts)
    assert run.streams == (mode != "resident")
    assert_equals(run, reference, prompts, TOLERANCES["float32"])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mode", ["resident", "host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_a_prompt_s_own(family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Alone as among neighbours, the second time as the first; and near plain transformers' in fp32."""
    reference = make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in LENGTHS]
    config = config_for(tmp_path, mode, dtype)
    together, again = run_greedily(config, prompts), run_greedily(config, prompts)
    for index, prompt in enumerate(prompts):
        alone = run_greedily(config, [prompt])
        assert torch.equal(alone.logits[0], together.logits[index]), "neighbours change bits"
        assert torch.equal(again.logits[index], together.logits[index]), "a second run changes bits"
        with torch.inference_mode():
            ids = torch.tensor([prompt + together.tokens[index]])
            expected = reference(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        difference = (together.logits[index].float() - expected).abs().max() / expected.abs().max()
        assert difference <= TOLERANCES[dtype], f"logits differ by {difference:.2e}"


@pytest.mark.parametrize("ceiling", [CEILING, 4 * CEILING])
def test_the_ceiling_is_kept(ceiling: int, tmp_path: Path, tokenizer_folder: Path, monkeypatch) -> None:
    """A model of 600 MB streams within it, its units being layers."""
    monkeypatch.setattr(on_host, "FINEST_UNIT_BYTES", 16 * MIB)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "head_dim": 256}
    make_model("llama", tmp_path, sizes=sizes)
    add_tokenizer(tmp_path, tokenizer_folder)
    config = EngineConfig(str(tmp_path), device="cuda", dtype="bfloat16", memory_bytes=ceiling, host_memory_bytes=2**31)
    torch.cuda.reset_peak_memory_stats()
    assert run_greedily(config, [draw_prompt(length) for length in LENGTHS]).streams == (ceiling == CEILING)
    assert torch.cuda.max_memory_reserved() <= ceiling

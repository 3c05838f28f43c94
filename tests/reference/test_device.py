"""On a pretended device, wherever the weights are: every operation has its tensors in one place, every copy is late,
and tokens and logits are those of plain transformers. (All families and formats run on it in the tests of those.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream.planner import facts as assumed
from layerstream.planner import on_host
from layerstream.setup.plan_model import plan_model

from tests.harness import NEW_TOKENS, STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import make_model
from tests.pretend import PretendCuda, Pretended

PROMPT_LENGTHS = (150, 5, 67)
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *(("llama", mode) for mode in ("device-resident", "device-host", "device-disk", "device-cut")),
        *((family, "device-resident") for family in ("gemma2", "gpt-oss", "deepseek-v3")),
        *((family, "device-disk") for family in ("mistral-window", "qwen3-moe", "deepseek-v3")),
    ],
)
def test_wherever_the_weights_are(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path, pretended_cuda: PretendCuda
) -> None:
    reference = make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    config = config_for(tmp_path, mode)
    plan = plan_model(config)[0]
    assert plan.streams == (mode in STREAMING)
    assert (plan.disk_bytes > 0) == (mode in {"device-disk", "device-cut"})
    run = run_greedily(config, prompts)
    assert_equals(run, reference, prompts, TOLERANCE)
    assert pretended_cuda.peak_bytes() <= config.memory_bytes
    assert not pretended_cuda.pinned, "host memory was left pinned"
    assert pretended_cuda.ceiling == config.memory_bytes


@pytest.mark.parametrize(
    ("family", "mode"),
    [("mistral-window", "device-host"), ("gpt-oss", "device-resident"), ("llama4-text", "device-host")],
)
def test_a_device_without_kernels_for_many_queries(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single rows attend by padded products, others span by span."""
    monkeypatch.setattr(Pretended, "packages", frozenset())
    reference = make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    assert_equals(run_greedily(config_for(tmp_path, mode), prompts), reference, prompts, TOLERANCE)


@pytest.mark.parametrize("wide", [pytest.param(1, id="narrow", marks=pytest.mark.slow), pytest.param(8, id="wide")])
@pytest.mark.parametrize("mode", ["device-resident", "device-host", "device-cut"])
@pytest.mark.parametrize("lengths", [[1000], [300, 40, 7, 90] * 4], ids=["one long", "many"])
def test_the_ceiling_holds(
    lengths: list[int],
    mode: str,
    wide: int,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pretended_cuda: PretendCuda,
) -> None:
    """Every tensor that the device holds is counted, those of an instant as well."""
    monkeypatch.setattr(assumed, "DEVICE_SWEEP_TOKENS", 2048)
    monkeypatch.setattr(assumed, "DEVICE_PROMPT_ROWS", 256)
    monkeypatch.setattr(on_host, "MIN_KV_TOKENS", 1088)
    make_model("llama", tmp_path, sizes={"intermediate_size": 96 * wide})
    add_tokenizer(tmp_path, tokenizer_folder)
    config = config_for(tmp_path, mode)
    run_greedily(config, [draw_prompt(length, seed) for seed, length in enumerate(lengths)])
    assert config.memory_bytes is not None
    assert 0 < pretended_cuda.most_bytes <= config.memory_bytes


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["device-host", "device-cut"])
@pytest.mark.parametrize(("length", "batch"), [(512, 1), (512, 32), (4000, 8), (32_000, 1)])
def test_the_ceiling_holds_for_long_contexts_and_for_many(
    length: int,
    batch: int,
    mode: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pretended_cuda: PretendCuda,
) -> None:
    """From 512 tokens to 32,000, alone and 32 at once, in the smallest budget that holds one of them."""
    monkeypatch.setattr(on_host, "MIN_KV_TOKENS", length + 128)
    make_model("llama", tmp_path, sizes={"max_position_embeddings": 33_000})
    add_tokenizer(tmp_path, tokenizer_folder)
    config = config_for(tmp_path, mode)
    run = run_greedily(config, [draw_prompt(length, seed) for seed in range(batch)])
    assert all(len(tokens) == NEW_TOKENS for tokens in run.tokens)
    assert config.memory_bytes is not None
    assert 0 < pretended_cuda.most_bytes <= config.memory_bytes

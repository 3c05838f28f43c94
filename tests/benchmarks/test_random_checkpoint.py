"""A random checkpoint has the names and sizes of its shape: the engine and plain transformers open it, and agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import random_checkpoint
from tests.harness import assert_equals, config_for, draw_prompt, run_greedily

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 320, "sliding_window": 16,
}  # fmt: skip
SMALLER: dict[str, dict[str, Any]] = {
    "Gemma-4-26B-A4B": {
        "num_global_key_value_heads": 1, "global_head_dim": 32, "num_experts": 6, "top_k_experts": 2,
        "moe_intermediate_size": 48, "vocab_size_per_layer_input": 320,
    },
    "Qwen3-VL-8B": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
}  # fmt: skip


def small(name: str) -> dict[str, Any]:
    """The shape *name* with small numbers."""
    shape = copy.deepcopy(random_checkpoint.SHAPES[name])
    shape["text_config"] |= SMALL | SMALLER[name]
    return shape


@pytest.mark.parametrize("name", SMALLER)
def test_equals_plain_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "STD", 0.2)
    random_checkpoint.write(small(name), tmp_path, num_layers=6)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = [draw_prompt(length) for length in (40, 5)]
    assert_equals(run_greedily(config_for(tmp_path, "resident"), prompts), reference, prompts, 1e-4)


def test_quantised(tmp_path: Path) -> None:
    random_checkpoint.write(small("Qwen3-VL-8B"), tmp_path, num_layers=2, quantization="int4")
    run = run_greedily(config_for(tmp_path, "resident"), [draw_prompt(9)])
    assert all(logits.isfinite().all() for logits in run.logits)

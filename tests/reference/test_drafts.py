"""Guesses change how many sweeps an answer takes, and not one bit of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream.setup.assembly import assemble
from layerstream.setup.stepping import step_greedily

from tests.crossing import crossed
from tests.guesser import Guesser
from tests.harness import add_tokenizer, config_for, draw_prompt
from tests.models import make_model

NUM_TOKENS = 14
PROMPT_LENGTHS = (45, 3, 70)


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    crossed(
        ["llama", "mistral-window", "gemma2", "llama4-text", "qwen3-moe", "gpt-oss", "deepseek-v3"],
        ["resident", "layers"],
        ["float32", "bfloat16"],
    ),
)
def test_bits_with_and_without(family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    _compare(family, mode, dtype, tmp_path, tokenizer_folder, num_trials=3)


@pytest.mark.parametrize(("family", "mode"), [("llama", "device-host"), ("deepseek-v3", "device-resident")])
def test_bits_on_a_device(family: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    _compare(family, mode, "float32", tmp_path, tokenizer_folder, num_trials=1)


def _compare(family: str, mode: str, dtype: str, folder: Path, tokenizer_folder: Path, num_trials: int) -> None:
    make_model(family, folder)
    add_tokenizer(folder, tokenizer_folder)
    config = replace(config_for(folder, mode), dtype=dtype)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    parts = assemble(config, None)
    try:
        tokens, logits = step_greedily(parts, prompts, NUM_TOKENS)
        before = parts.step.num_sweeps
        for seed in range(num_trials):
            guesser = Guesser(tokens, seed)
            found, found_logits = step_greedily(parts, prompts, NUM_TOKENS, guesser)
            assert guesser.num_guessed
            assert found == tokens
            assert all(torch.equal(a, b) for a, b in zip(found_logits, logits, strict=True))
        assert parts.step.num_sweeps - before < num_trials * before, "some of the guesses were right"
    finally:
        parts.close()

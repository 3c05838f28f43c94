"""A request's bits do not depend on its neighbours, nor on where its rows lie in a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import add_tokenizer, budget_for, draw_prompt, run_greedily
from tests.models import make_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["resident", "layers"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v3"])
def test_alone_equals_among_others(family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    budget = budget_for(tmp_path, mode)
    prompt = draw_prompt(45)
    others = [draw_prompt(length) for length in (80, 3, 21)]
    alone = run_greedily(tmp_path, budget, [prompt], dtype)
    among = run_greedily(tmp_path, budget, [others[0], prompt, *others[1:]], dtype)
    assert torch.equal(alone.logits[0], among.logits[1])
    assert alone.tokens[0] == among.tokens[1]

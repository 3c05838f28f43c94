"""A request's bits do not depend on its neighbours, nor on where its rows lie in a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream.planner import on_host
from layerstream.setup.assembly import assemble
from layerstream.setup.stepping import step_greedily

from tests.crossing import crossed
from tests.harness import add_tokenizer, config_for, draw_prompt, run_greedily
from tests.models import make_model


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    crossed(
        [
            "llama",
            "gemma2",
            "gemma3n-text",
            "qwen2-moe",
            "qwen3-moe",
            "gpt-oss",
            "deepseek-v3",
            "qwen3_5_text",
            "falcon_h1",
        ],
        ["resident", "layers", "device-host"],
        ["float32", "bfloat16"],
    ),
)
def test_alone_equals_among_others(family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    config = replace(config_for(tmp_path, mode), dtype=dtype)
    prompt = draw_prompt(45)
    others = [draw_prompt(length) for length in (80, 3, 21)]
    alone = run_greedily(config, [prompt])
    among = run_greedily(config, [others[0], prompt, *others[1:]])
    assert torch.equal(alone.logits[0], among.logits[1])
    assert alone.tokens[0] == among.tokens[1]


@pytest.mark.parametrize("family", ["deepseek-v3", "llama4-text"])
def test_a_last_chunk_of_one_row_keeps_its_bits(family: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Cold, behind its other chunks; warm, alone in its sweep; and among others' rows. Experts come as they are routed
    to, and see one row block in one sweep, several in another."""
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    parts = assemble(config_for(tmp_path, "layers"), None)
    try:
        assert parts.plan.weights.expert_slots
        for length in (1, 33):
            prompt = draw_prompt(length)
            cold, warm = (step_greedily(parts, [prompt], 2)[1][0] for _ in range(2))
            among = step_greedily(parts, [draw_prompt(40, seed=length), prompt, draw_prompt(1)], 2)[1][1]
            assert torch.equal(cold, warm), f"{length} tokens, warm"
            assert torch.equal(cold, among), f"{length} tokens, among others"
    finally:
        parts.close()


def test_equal_requests_get_equal_bits_in_every_place_of_a_block(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The sigmoids of six experts are no whole vectors."""
    make_model("glm4-moe", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    parts = assemble(config_for(tmp_path, "resident"), None)
    try:
        logits = step_greedily(parts, [draw_prompt(5)] * parts.plan.decode_rows, 8)[1]
    finally:
        parts.close()
    for other in logits[1:]:
        assert torch.equal(other, logits[0])


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("qwen3_5_text", "float32")]
)
def test_suspended_and_resumed(
    family: str, dtype: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory for KV runs out, the last one admitted waits on disk; its bits are those of one that never did."""
    for name in ("MIN_KV_TOKENS", "WANTED_KV_TOKENS"):
        monkeypatch.setattr(on_host, name, 256)
    monkeypatch.setattr(on_host, "MORE_KV_SHARE", 0.0)
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    config = replace(config_for(tmp_path, "layers", dtype), max_context=250)
    prompts = [draw_prompt(length) for length in (70, 40, 90, 50)]
    parts = assemble(config, None)
    try:
        alone = [step_greedily(parts, [prompt], 70) for prompt in prompts]
        assert not parts.kv.swap.written_pages
        tokens, logits = step_greedily(parts, prompts, 70)
        assert parts.kv.swap.written_pages
    finally:
        parts.close()
    for number, (own_tokens, own_logits) in enumerate(alone):
        assert own_tokens[0] == tokens[number]
        assert torch.equal(own_logits[0], logits[number])

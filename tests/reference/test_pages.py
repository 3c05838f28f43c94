"""A prompt that begins in the middle of a chunk has the bits of one that begins at position 0, wherever it ends."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream.planner import facts as assumed
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.stepping import step_greedily

from tests.crossing import ALONE, crossed
from tests.harness import add_tokenizer, config_for, draw_prompt
from tests.models import make_model

PAGES = (1, 4, 8, 16, 32)
CHUNKS = (8, 16, 32, 64)
ROWS = (32, 64, 96)
NEW_TOKENS = 3
WINDOWS = ("sliding_window", "attention_chunk_size")
FAMILIES = ["llama", "gemma2", "gpt-oss", "llama4-text", "deepseek-v3", "qwen3-moe", "gemma3n-text"]


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    crossed(FAMILIES, ["resident", "layers", "cut"], ["float32", "bfloat16"], without=[ALONE]),
)
def test_warm_equals_cold(
    family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and beside those whose pages it shares, which are computed in the very sweep."""
    rng = random.Random(f"{family} {mode} {dtype}")
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    for _ in range(2):
        page, chunk = _draw_sizes(rng)
        monkeypatch.setattr(assumed, "PAGE_CHOICES", (page,))
        monkeypatch.setattr(assumed, "CHUNK_TOKENS", chunk)
        monkeypatch.setattr(assumed, "ALONE_CHUNK_TOKENS", chunk)
        monkeypatch.setattr(assumed, "RESIDENT_PROMPT_ROWS", rng.choice(ROWS))
        window = _set_windows(tmp_path, rng)
        parts = assemble(replace(config_for(tmp_path, mode, dtype), kv_store=None), None)
        try:
            assert (parts.plan.page_tokens, parts.plan.chunk_tokens) == (page, chunk)
            for _ in range(3):
                _compare(parts, rng, f"pages of {page}, chunks of {chunk}, windows of {window}")
        finally:
            parts.close()


def _draw_sizes(rng: random.Random) -> tuple[int, int]:
    chunk = rng.choice(CHUNKS)
    return rng.choice([page for page in PAGES if chunk % page == 0]), chunk


def _set_windows(folder: Path, rng: random.Random) -> int:
    """Have layers with a window, or chunks, see another number of positions."""
    window = rng.randrange(3, 90)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update({name: window for name in WINDOWS if config.get(name)})
    path.write_text(json.dumps(config))
    return window


def _compare(parts: Assembly, rng: random.Random, what: str) -> None:
    prompt = draw_prompt(rng.randrange(2, 140), seed=rng.randrange(1000))
    shared = [rng.randrange(1, len(prompt)) for _ in range(2)]
    others = [[*prompt[:count], 2, *draw_prompt(rng.randrange(1, 70), seed=9)] for count in shared]
    what = f"{what}, {len(prompt)} tokens of which {shared} are shared"
    cold = _answers(parts, [prompt])[0]
    _answers(parts, others[:1])
    warm = _answers(parts, [prompt], anew=False)[0]
    assert torch.equal(cold, warm), what
    again = _answers(parts, [prompt], anew=False)[0]
    assert torch.equal(cold, again), f"{what}, once more"
    among = _answers(parts, [others[0], prompt, others[1]])[1]
    assert torch.equal(cold, among), f"{what}, among others"


def _answers(parts: Assembly, prompts: list[list[int]], *, anew: bool = True) -> list[torch.Tensor]:
    """Logits; *anew*: there are no prefixes in memory, and what is left there is no number."""
    if anew:
        for state in parts.kv.states:
            if state.shape is not None:
                for tensor in state.row_range(0, parts.plan.num_pages * parts.plan.page_tokens):
                    with torch.inference_mode():
                        tensor.fill_(float("nan"))
        parts.scheduler.reset()
        while parts.scheduler.next_decision() is not None:
            pass
    return step_greedily(parts, prompts, NEW_TOKENS)[1]

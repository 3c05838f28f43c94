"""Prompts that are read, beside plain transformers: pooled hidden states and logits of some tokens, fp32, of families
with windows, latents, experts and states; with the same bits when KV was there before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layerstream import LayerStream
from layerstream.setup.config import EngineConfig
from layerstream.store.config import KVStoreConfig

from tests.harness import add_tokenizer, config_for, draw_prompt
from tests.models import make_model

TOLERANCE = 1e-5
TOKENS = (7, 9, 300)
PROMPTS = [draw_prompt(length) for length in (150, 5, 67, 33)]
PROMPTS.append([*PROMPTS[0][:100], 5, 6])  # shares what the first has, and parts within a page


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", "resident"),
        ("qwen3", "layers"),
        ("qwen3", "device-host"),
        ("gemma2", "cut"),
        ("deepseek-v3", "layers"),
        ("qwen3-moe", "layers"),
        ("qwen3-moe", "device-host"),
        ("qwen3_5_text", "layers"),
        ("mamba2", "resident"),
    ],
)
def test_equals_plain_transformers(family: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    model = tmp_path / "model"
    reference = make_model(family, model)
    add_tokenizer(model, tokenizer_folder)
    store = KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)
    config = replace(config_for(model, mode), kv_store=store)
    cold, warm = _read(config), _read(config)
    for name, expected in _expect(reference).items():
        scale = max(1.0, float(np.abs(expected).max()))
        assert np.abs(cold[name] - expected).max() <= TOLERANCE * scale, name
        assert np.array_equal(cold[name], warm[name]), name


def _read(config: EngineConfig) -> dict[str, np.ndarray]:
    """What is read of all prompts together; the same alone."""
    with LayerStream(
        config.model,
        device=config.device,
        memory=config.memory_bytes,
        host_memory=config.host_memory_bytes,
        dtype=config.dtype,
        kv_store=config.kv_store,
        progress=False,
    ) as engine:
        found = _read_all(engine, PROMPTS)
        alone = [_read_all(engine, [prompt]) for prompt in PROMPTS]
    for name, together in found.items():
        assert np.array_equal(together, np.concatenate([one[name] for one in alone])), name
    return found


def _read_all(engine: LayerStream, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    return {
        "last": engine.embed(prompts, normalize=False, keep=True),
        "mean": engine.embed(prompts, pooling="mean", normalize=False),
        "score": engine.score(prompts, TOKENS),
    }


def _expect(reference: Any) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {"last": [], "mean": [], "score": []}
    hidden: list[torch.Tensor] = []
    decoder = reference.get_decoder() if hasattr(reference, "get_decoder") else reference.backbone
    handle = decoder.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state[0]))
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([prompt])).logits[0, -1]
        found["last"].append(hidden[-1][-1].numpy())
        found["mean"].append(hidden[-1].mean(0).numpy())
        found["score"].append(torch.softmax(logits[list(TOKENS)], dim=-1).numpy())
    handle.remove()
    return {name: np.stack(values) for name, values in found.items()}

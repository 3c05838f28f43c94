"""The language model inside a multimodal checkpoint, against the whole model given text only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.harness import add_tokenizer, config_for, draw_prompt, run_greedily

_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16},
    },
    "llama4": {
        "text_config": {**_TEXT, "intermediate_size_mlp": 96, "num_local_experts": 4},
        "vision_config": {
            **_VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
}


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_language_model_runs_alone(family: str, original_format: bool, tmp_path: Path, tokenizer_folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **MODELS[family])
    prefix = type(config).__name__.removesuffix("Config")
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    model.save_pretrained(tmp_path, save_original_format=original_format)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompt = draw_prompt(70)
    run = run_greedily(config_for(tmp_path, "layers"), [prompt])
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + run.tokens[0]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    assert (run.logits[0] - expected).abs().max() <= 1e-4 * expected.abs().max()

"""A config is held against the weights that are there, before any library builds what it asks for."""

from __future__ import annotations

from typing import Any

import pytest
from layerstream.checkpoint.config import check_config
from layerstream.errors import InvalidHeader

SHAPES = [(512, 64), (64, 64), (64,)] * 10
GOOD = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None, "max_position_embeddings": 2**60,
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sliding_window": None, "head_dim": 16, "intermediate_size": [128, 64]},
        {"num_local_experts": 0, "num_experts_per_tok": 0, "sliding_window": 0},
        {"num_experts": 8, "num_experts_per_tok": 8},
        {"text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": -1}},
        {"text_config": "x"},
    ],
)
def test_what_can_be_a_model(more: dict[str, Any]) -> None:
    check_config({**GOOD, **more}, "x", SHAPES)


SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "max_position_embeddings"]  # fmt: skip


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2**63, 10**30, 1.5, 4.0, "4", True, {}, [0], [[4]], float("nan")])
def test_sizes_are_whole_and_in_range(name: str, value: Any, inside: bool) -> None:
    config = {**GOOD, "text_config": {name: value}} if inside else {**GOOD, name: value}
    with pytest.raises(InvalidHeader, match=f"x: {name} is"):
        check_config(config, "x", SHAPES)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": ""}, "model_type"),
        ({"num_hidden_layers": 31}, "num_hidden_layers is 31; expected 1 to 30"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"hidden_size": 5000}, "hidden_size is 5000; expected 1 to 4096"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"num_key_value_heads": 8}, "does not divide"),
        ({"head_dim": 15}, "even"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5; expected 1 to 4"),
        ({"num_local_experts": 4, "num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"n_routed_experts": -4}, "n_routed_experts"),
        ({"kv_lora_rank": "24"}, "kv_lora_rank"),
        ({"sliding_window": -5}, "sliding_window"),
        ({"attention_chunk_size": "x"}, "attention_chunk_size"),
    ],
)
def test_what_cannot_is_named(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidHeader, match=words):
        check_config({**GOOD, **more}, "x", SHAPES)


def test_without_a_tensor_there_is_no_layer() -> None:
    with pytest.raises(InvalidHeader):
        check_config(GOOD, "x", [])

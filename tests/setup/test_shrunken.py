"""A config shrunk for the self-check: small, of every kind of layer, and all that begins at a position within reach."""

from __future__ import annotations

from typing import Any

import pytest
from layerstream.model.anatomy import own_class
from layerstream.model.families import usable_context
from layerstream.model.meta import no_weights
from layerstream.setup.self_check import NEW_TOKENS, PROMPT_LENGTHS
from layerstream.setup.shrunken import CONTEXT, ORDINARY_IDS, REACHED, VOCAB_SIZE, shrink
from layerstream.setup.shrunken_layers import MOST_LAYERS, Layers

from benchmarks.published import full_config
from tests.models.hybrids import HYBRIDS

MOST_NUMBERS = 3_000_000
TEXT = """
    afmoe axk1 cohere2_moe cohere_compass_text cwm deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe gemma3n_text
    gemma4_text glm4_moe_lite gpt_oss hunyuan_v1_moe laguna llama llama4_text minicpm3 ministral3 minimax_m2
    minimax_m3_vl_text mimo_v2_flash mistral4 mellum nemotron phi3 phimoe qwen3_moe qwen3_next solar_open youtu
""".split()
WITH_TOWERS = "aya_vision gemma4 glm4v_moe kimi_k25 llama4 qwen2_vl qwen3_vl voxtral".split()
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")


@pytest.mark.parametrize("family", [*TEXT, *WITH_TOWERS])
def test_what_is_left_of_a_family(family: str) -> None:
    full = full_config(family)
    small = shrink(full)
    text, whole = small.get_text_config(decoder=True), full.get_text_config(decoder=True)
    assert 4 <= text.num_hidden_layers <= MOST_LAYERS
    for name in KINDS:
        if getattr(whole, name, None):
            assert set(getattr(text, name)) == set(getattr(whole, name))
            assert len(getattr(text, name)) == text.num_hidden_layers
    for name in ("sliding_window", "attention_chunk_size", "floor_scale", "index_topk"):
        value = getattr(text, name, None)
        assert value is None or value < REACHED
    assert usable_context(text) >= max(PROMPT_LENGTHS) + NEW_TOKENS
    with no_weights():
        model: Any = own_class(small)._from_config(small)  # type: ignore[union-attr]
    assert sum(parameter.numel() for parameter in model.parameters()) < MOST_NUMBERS


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4", "laguna", "llama", "phi3", "qwen3_vl"])
def test_what_is_small_stays_as_it_is(family: str) -> None:
    small = shrink(full_config(family))
    assert shrink(small).to_dict() == small.to_dict()


@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "granitemoehybrid", "mamba2"])
def test_heads_of_mixers_fill_their_width(name: str) -> None:
    """As their configs ask for, whether there were few heads or many."""
    for config in (full_config(name), HYBRIDS[name].config()):
        small = shrink(config)
        assert shrink(small).to_dict() == small.to_dict()


def test_a_group_of_experts_has_several() -> None:
    small = shrink(full_config("bailing_hybrid"))
    assert small.n_group > small.topk_group
    assert small.num_local_experts > small.n_group


def test_a_model_smaller_than_the_prompts_is_made_large_enough() -> None:
    small = shrink(full_config("gpt_bigcode", vocab_size=100, n_positions=64))
    assert (small.vocab_size, small.n_positions) == (VOCAB_SIZE, CONTEXT)


def test_layers_that_share_keys_and_values_follow_ones_that_have_them() -> None:
    small = shrink(full_config("gemma3n_text"))
    own, shared = small.layer_types[: -small.num_kv_shared_layers], small.layer_types[-small.num_kv_shared_layers :]
    assert set(shared) == {"sliding_attention", "full_attention"}
    assert set(own) == set(shared)
    assert set(small.activation_sparsity_pattern) == {0.95, 0.0}


def test_overrides_by_layer_still_differ() -> None:
    small = shrink(full_config("gemma4_text"))
    assert small.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    assert [layer.head_dim for layer in small.per_layer_config] == [16, 16, 32, 32]


def test_latents_keep_how_their_heads_are_made_up() -> None:
    small = shrink(full_config("glm4_moe_lite"))
    assert (small.qk_rope_head_dim, small.qk_nope_head_dim, small.v_head_dim) == (8, 24, 32)
    assert small.qk_head_dim == 32
    small = shrink(full_config("deepseek_v3"))
    assert small.head_dim == small.qk_rope_head_dim
    assert small.first_k_dense_replace == 2, "layers 0 and 1 of the four that stay"
    assert small.n_routed_experts // small.n_group >= 2
    assert small.topk_group <= small.n_group


def test_numbers_of_heads_by_layer_still_differ() -> None:
    heads = [48 if layer == 0 else 64 for layer in range(40)]
    small = shrink(full_config("laguna", num_attention_heads_per_layer=heads))
    assert small.num_attention_heads_per_layer == [4, 8, 8, 8]
    assert small.num_key_value_heads == 2


def test_scaled_positions_are_left_behind() -> None:
    llama = shrink(full_config("llama"))
    assert llama.rope_parameters["original_max_position_embeddings"] == REACHED
    assert llama.max_position_embeddings == 16 * REACHED, "as many times as before"
    phi = shrink(full_config("phi3"))
    assert phi.original_max_position_embeddings == phi.rope_parameters["original_max_position_embeddings"] == CONTEXT
    assert len(phi.rope_parameters["short_factor"]) == len(phi.rope_parameters["long_factor"]) == 8


def test_rotated_sections_are_those_of_the_smaller_heads() -> None:
    text = shrink(full_config("qwen2_vl")).text_config
    assert sum(text.rope_parameters["mrope_section"]) == 8
    assert min(text.rope_parameters["mrope_section"]) > 0


def test_special_tokens_are_in_the_vocabulary_and_in_no_prompt() -> None:
    small = shrink(full_config("qwen3_vl"))
    ids = [small.image_token_id, small.video_token_id, small.vision_start_token_id, small.vision_end_token_id]
    assert len(set(ids)) == 4
    assert all(ORDINARY_IDS.stop <= token < VOCAB_SIZE for token in ids)


def test_a_window_of_nothing_is_not_made_up() -> None:
    assert shrink(full_config("phimoe", sliding_window=None)).sliding_window is None
    assert shrink(full_config("phimoe", sliding_window=2047)).sliding_window == 24


def test_lists_and_counts_by_layer_are_cut_together() -> None:
    layers = Layers.of(
        {
            "vocab_size": 1000, "num_hidden_layers": 12, "first_k_dense_replace": 3, "num_kv_shared_layers": 4,
            "mlp_only_layers": [5], "layer_types": ["a", "b"] * 6, "eos_token_id": list(range(12)),
        }
    )  # fmt: skip
    assert layers is not None
    assert layers.kept == (0, 1, 3, 4, 5, 8, 9, 11)

    def same(_: str, value: Any) -> Any:
        return value

    assert layers.cut("num_hidden_layers", 12, same) == 8
    assert layers.cut("first_k_dense_replace", 3, same) == 2
    assert layers.cut("num_kv_shared_layers", 4, same) == 3
    assert layers.cut("mlp_only_layers", [5], same) == [4]
    assert layers.cut("layer_types", ["a", "b"] * 6, same) == ["a", "b", "b", "a", "b", "a", "b", "b"]
    assert not layers.are_told_by("eos_token_id", list(range(12)))


def test_very_many_kinds_are_cut_until_nothing_in_them_is_new() -> None:
    said = {"vocab_size": 1000, "num_hidden_layers": 48, "a": list(range(48)), "b_types": [at % 2 for at in range(48)]}
    layers = Layers.of({**said, "a": [at % 24 for at in range(48)]})
    assert layers is not None
    assert {at % 24 for at in layers.kept} == set(range(24))
    assert len(layers.kept) <= 25

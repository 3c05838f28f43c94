"""Which model families run, and why the others are refused.

A family is on the list because a test compares it with plain transformers, token by token (tests/reference). The flag
``_supports_attention_backend`` alone is no proof: it is set for families that keep recurrent state, and not set for
some that work.
"""

from __future__ import annotations

from typing import Any

from layerstream.errors import UnsupportedModel

TESTED = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "deepseek_v3",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granitemoe",
        "helium",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)

ONE_SEQUENCE_PER_BLOCK = frozenset({"deepseek_v2", "deepseek_v3", "llama4_text"})
"""Latents are expanded, or temperatures counted, for one sequence at a time."""

_BYPASS = frozenset({"bloom", "falcon", "gptj", "mpt", "codegen", "ctrl", "xlnet", "xlm"})
_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def check_supported(config: Any, *, allow_untested: bool = False) -> None:
    """Raise :class:`UnsupportedModel` where *config* is of a family that cannot run, with the reason."""
    family = config.model_type
    recurrent = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS)
    if recurrent:
        raise UnsupportedModel(
            f"{family!r} has layers of type {recurrent}: they keep recurrent state, and LayerStream streams models "
            "whose only state is attention's keys and values"
        )
    if family in _BYPASS:
        raise UnsupportedModel(
            f"{family!r} computes attention inside its own modules and bypasses transformers' attention interface, "
            "which LayerStream runs on"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{family!r} is an encoder-decoder; LayerStream runs decoder-only language models")
    if getattr(config, "use_bidirectional_attention", False) in (True, "all"):
        raise UnsupportedModel(f"this {family!r} attends in both directions; LayerStream runs causal models")
    if family not in TESTED and not allow_untested:
        raise UnsupportedModel(
            f"the family {family!r} is not among the tested ones ({', '.join(sorted(TESTED))}); allow_untested=True "
            "tries it after a self-check against plain transformers"
        )


def latent_width(config: Any) -> int | None:
    """Values per token and layer that a latent-attention model (MLA) caches, else ``None``."""
    rank = getattr(config, "kv_lora_rank", None)
    return rank + config.qk_rope_head_dim if rank else None


def kv_values_per_token(config: Any) -> int:
    """Values that all layers together cache for one token."""
    width = latent_width(config)
    if width is None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * heads * head_dim
    return width * config.num_hidden_layers


def usable_context(config: Any) -> int:
    """Tokens a sequence may have.

    LongRoPE and dynamic NTK choose their frequencies by the longest position of a whole forward, so past the original
    length a neighbour would change another request's keys: those models run up to the original length.
    """
    longest = getattr(config, "max_position_embeddings", None) or 2048
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [rope] if "rope_type" in rope else [item for item in rope.values() if isinstance(item, dict)]
    for scaling in scalings:
        if scaling.get("rope_type") in {"dynamic", "longrope"}:
            original = scaling.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or longest
            longest = min(longest, original)
    return longest

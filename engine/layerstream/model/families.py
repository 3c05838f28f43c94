"""The model families: a row each, for what this engine has to know beside what transformers does.

A family counts as tested because a test compares it with plain transformers, token by token (tests/reference). The flag
``_supports_attention_backend`` is no proof: families that keep recurrent state have it, and some that work do not.
To add one: a row here, and a small model in tests/models.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layerstream.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        name: transformers' ``model_type`` of its language model.
        is_tested: whether a test compares it with plain transformers.
        one_sequence_per_block: whether latents are expanded, or temperatures counted, for one sequence at a time.
        bypasses_attention: whether it computes attention inside its own modules, where this engine has no say.
        adapt: changes the modules of a model that would compute more than they need.
    """

    name: str
    is_tested: bool = True
    one_sequence_per_block: bool = False
    bypasses_attention: bool = False
    adapt: Callable[[Any], None] | None = None


def _adapt_llama4(model: Any) -> None:
    from layerstream.model.llama4 import adapt  # transformers' modules of that family: not for every model

    adapt(model)


_ORDINARY = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe cwm dbrx deepseek_v2 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
"""
_BYPASSING = "bloom falcon gptj mpt codegen ctrl xlnet xlm"

FAMILIES = {
    row.name: row
    for row in (
        *map(Family, _ORDINARY.split()),
        Family("deepseek_v2", is_tested=False, one_sequence_per_block=True),
        Family("deepseek_v3", one_sequence_per_block=True),
        Family("llama4_text", one_sequence_per_block=True, adapt=_adapt_llama4),
        *(Family(name, is_tested=False, bypasses_attention=True) for name in _BYPASSING.split()),
    )
}
TESTED = frozenset(row.name for row in FAMILIES.values() if row.is_tested)

_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def family_of(config: Any) -> Family:
    """That of a model with *config*; one that has no row is not tested."""
    name = getattr(config, "model_type", "")
    return FAMILIES.get(name) or Family(name, is_tested=False)


def check_supported(config: Any, *, allow_untested: bool = False) -> None:
    """Raise :class:`UnsupportedModel` where *config* is of a family that cannot run, with the reason."""
    family, row = config.model_type, family_of(config)
    recurrent = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS)
    if recurrent:
        raise UnsupportedModel(
            f"{family!r} has layers of type {recurrent}: they keep recurrent state, and LayerStream streams models "
            "whose only state is attention's keys and values"
        )
    if row.bypasses_attention:
        raise UnsupportedModel(
            f"{family!r} computes attention inside its own modules and bypasses transformers' attention interface, "
            "which LayerStream runs on"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{family!r} is an encoder-decoder; LayerStream runs decoder-only language models")
    if getattr(config, "use_bidirectional_attention", False) in (True, "all"):
        raise UnsupportedModel(f"this {family!r} attends in both directions; LayerStream runs causal models")
    if not row.is_tested and not allow_untested:
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

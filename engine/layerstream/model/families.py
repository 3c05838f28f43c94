"""The model families: a row each, for what this engine has to know beside what transformers does.

A family counts as tested because a test compares it with plain transformers, token by token (tests/reference). What it
keeps, attends to and sees is not written here: it is found out for each model (:mod:`layerstream.model.trace`).
To add one: a name here, and a small model in tests/models/.
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
        name: transformers' ``model_type`` of its config, or of its language model's.
        is_tested: whether a test compares it with plain transformers.
        adapt: changes the modules of a model that would compute more than they need.
    """

    name: str
    is_tested: bool = True
    adapt: Callable[[Any], None] | None = None


def _adapt_llama4(model: Any) -> None:
    from layerstream.model.llama4 import adapt  # transformers' modules of that family: not for every model

    adapt(model)


WITHOUT_ATTENTION = 2**17
"""Tokens that a model without attention may be given: accounts are kept for as many."""

_ORDINARY = """
    afmoe apertus arcee aria aria_text axk1 aya_vision bailing_hybrid bamba beam biogpt bitnet cohere cohere2
    cohere2_moe cohere2_vision cohere_compass cwm deepseek_v2 deepseek_v3 deepseek_vl diffllama dots1 ernie4_5
    ernie4_5_moe exaone4 exaone4_5 exaone_moe falcon_h1 falcon_mamba fast_vlm flex_olmo flint fun_asr_nano gemma
    gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm46v
    glm4_moe glm4_moe_lite glm4v glm4v_moe glm_ocr glmasr got_ocr2 gpt_bigcode gpt_neox gpt_oss granite
    granite4_vision granite_docling granite_speech granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hy_v3 hyperclovax hyperclovax_vision_v2
    idefics2 idefics3 internlm3 internvl iquestcoder jais2 jamba kimi_k25 kimi_linear kolibri1 laguna lfm2 lfm2_moe
    lfm2_vl lfm3 lfm3_vl lighton_ocr llama llama4 llava llava_next llava_next_video llava_onevision mamba mamba2
    mellum mimo_v2_flash minicpm3 minicpmv4_6 minicpmv4_7 minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral
    ministral3 mistral mistral3 mixtral molmo2 moss_transcribe_diarize muse_glimmer nanochat nemotron nemotron_h
    olmo olmo2 olmo3 olmo_hybrid olmoe opt ovis2 paddleocr_vl persimmon phi phi3 phimoe qianfan_ocr qwen2
    qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe seed_oss smollm3
    smolvlm solar_open stablelm starcoder2 vaultgemma video_llama_3 video_llava vipllava voxtral youtu
"""

FAMILIES = {row.name: row for row in (*map(Family, _ORDINARY.split()), Family("llama4_text", adapt=_adapt_llama4))}
TESTED = frozenset(row.name for row in FAMILIES.values() if row.is_tested)


def families_of(config: Any) -> list[Family]:
    """The rows of a model with *config*: its own, and its language model's; one that has no row is not tested."""
    names = dict.fromkeys((config.model_type, config.get_text_config(decoder=True).model_type))
    return [FAMILIES.get(name) or Family(name, is_tested=False) for name in names]


def is_tested(config: Any) -> bool:
    """Whether a model with *config*, or its language model, is of a family that a test compares; never one whose code
    comes with it."""
    if not type(config).__module__.startswith("transformers."):
        return False
    return any(row.is_tested for row in families_of(config))


def check_tested(config: Any) -> None:
    """Raise :class:`UnsupportedModel` where no test compares a model with *config*."""
    if not is_tested(config):
        raise UnsupportedModel(
            f"the family {config.model_type!r} is not among the tested ones (docs/models.md lists them); "
            "allow_untested=True tries it after a self-check against plain transformers"
        )


def check_supported(config: Any) -> None:
    """Raise :class:`UnsupportedModel` where *config* is of a family that cannot run, with the reason."""
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{family!r} is an encoder-decoder, and LayerStream runs decoder-only language models: use plain "
            "transformers for it"
        )
    text = config.get_text_config(decoder=True)
    if getattr(text, "use_bidirectional_attention", False) in (True, "all"):
        raise UnsupportedModel(f"this {family!r} attends in both directions; LayerStream runs causal models")


def usable_context(config: Any) -> int:
    """Tokens a sequence may have; models without attention, whose configs say none, have no limit of their own.

    LongRoPE and dynamic NTK choose their frequencies by the longest position of a whole forward, so past the original
    length a neighbour would change another request's keys: those models run up to the original length.
    """
    attends = getattr(config, "num_attention_heads", None) is not None
    longest = getattr(config, "max_position_embeddings", None) or (2048 if attends else WITHOUT_ATTENTION)
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [rope] if "rope_type" in rope else [item for item in rope.values() if isinstance(item, dict)]
    for scaling in scalings:
        if scaling.get("rope_type") in {"dynamic", "longrope"}:
            original = scaling.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or longest
            longest = min(longest, original)
    return longest

"""Checkpoints that see or hear, whose language model runs alone: saved whole, their towers small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.dense import DENSE
from tests.models.hybrids import HYBRIDS
from tests.models.mixtures import MIXTURES
from tests.models.sizes import (
    FEW_LOCAL,
    FULL,
    GROUPED,
    LATENT,
    LOCAL,
    LOCAL_AND_GLOBAL,
    MOE,
    VOCAB_SIZE,
    WINDOW,
    SmallModel,
    whole,
)

# fmt: off
_TOWER: Mapping[str, Any] = {  # whatever a tower calls its sizes
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
    "depth": 1, "num_layers": 1, "encoder_layers": 1, "num_heads": 2, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "d_model": 32, "embed_dim": 32, "image_size": 28, "patch_size": 14, "out_hidden_size": 64,
    "output_dim": 64, "num_mel_bins": 16, "downsample_hidden_size": 8, "position_embedding_size": 64,
    "num_position_embeddings": 16, "pos_emb_height": 4, "pos_emb_width": 4, "vocab_size": 64,
    "max_source_positions": 32, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32,
    "audio_embed_dim": 32, "intermediate_dim": 64, "resampler_n_latents": 4, "resampler_depth": 1,
    "resampler_n_heads": 2, "resampler_head_dim": 16,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_HALF_MROPE = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5,
    }
}
# fmt: on


def _tower(model_type: str = "", **others: Any) -> dict[str, Any]:
    return {**_TOWER, **({"model_type": model_type} if model_type else {}), **others}


def _of(family: str, **others: Any) -> Mapping[str, Any]:
    """The language model's config of *family*, as a whole checkpoint's config says it."""
    small: SmallModel = (DENSE | MIXTURES | HYBRIDS)[family]
    return {**small.changes, "model_type": small.model_type, **others}


_SIGLIP, _CLIP, _PIXTRAL = _tower("siglip_vision_model"), _tower("clip_vision_model"), _tower("pixtral")
_QFORMER = _tower("blip_2_qformer", encoder_hidden_size=32, cross_attention_frequency=1)

# fmt: off
MULTIMODAL = {
    "aria": whole("aria", _of("aria_text"), vision_config=_tower("idefics3_vision")),
    "aya_vision": whole("aya_vision", _of("cohere2"), vision_config=_SIGLIP),
    "cohere2_vision": whole(
        "cohere2_vision", _of("cohere2"), vision_config=_SIGLIP, alignment_intermediate_size=64,
    ),
    "cohere_compass": whole(
        "cohere_compass",
        {
            **LOCAL_AND_GLOBAL,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}, FULL: None,
            },
        },
        vision_config=_TOWER,
    ),
    "deepseek_vl": whole("deepseek_vl", _of("llama"), vision_config=_SIGLIP),
    "exaone4_5": whole("exaone4_5", _of("exaone4"), vision_config=_TOWER),
    "fast_vlm": whole("fast_vlm", _of("qwen2"), vision_config=_SIGLIP),
    "fun_asr_nano": whole(
        "fun_asr_nano", _of("qwen3"), audio_config=_tower("fun_asr_nano_encoder"),
        adaptor_config=_tower(hidden_size=64, intermediate_size=16),
    ),
    "gemma3-whole": whole("gemma3", _of("gemma3"), vision_config=_SIGLIP, mm_tokens_per_image=4),
    "gemma4": whole("gemma4", _of("gemma4-text-inputs"), vision_config=_TOWER, audio_config=_TOWER),
    "gemma4-moe": whole("gemma4", _of("gemma4-text-moe"), vision_config=_TOWER, audio_config=None),
    "gemma4_unified": whole("gemma4_unified", _of("gemma4-unified-text"), vision_config=_TOWER, audio_config=_TOWER),
    "glm46v": whole("glm46v", {"model_type": "glm4v_text", **_HALF_MROPE}, vision_config=_tower("glm4v_vision")),
    "glm4v": whole("glm4v", _HALF_MROPE, vision_config=_TOWER),
    "glm4v_moe": whole("glm4v_moe", {**GROUPED, **_HALF_MROPE}, vision_config=_TOWER),
    "glm_ocr": whole("glm_ocr", _HALF_MROPE, vision_config=_TOWER),
    "glmasr": whole("glmasr", _of("llama"), audio_config=_tower("glmasr_encoder")),
    "got_ocr2": whole("got_ocr2", _of("qwen2"), vision_config=_tower(output_channels=16)),
    "granite4_vision": whole(
        "granite4_vision", {"logits_scaling": 2.0, "residual_multiplier": 0.5},
        vision_config=_tower("siglip_vision_model", hidden_size=64),
        qformer_config=_QFORMER, deepstack_layer_map=[[0, 1]], spatial_target_layers=[2], downsample_rate="1/2",
    ),
    "granite_docling": whole("granite_docling", {}, vision_config=_TOWER),
    "granite_speech": whole("granite_speech", _of("granite"), encoder_config=_TOWER, projector_config=_QFORMER),
    "hunyuan_vl": whole("hunyuan_vl", _MROPE, vision_config=_TOWER),
    "hyperclovax_vision_v2": whole("hyperclovax_vision_v2", _of("hyperclovax"), vision_config=_SIGLIP),
    "idefics2": whole(
        "idefics2", _of("mistral-window"), vision_config=_TOWER, perceiver_config=_tower(num_key_value_heads=2)
    ),
    "idefics3": whole("idefics3", _of("llama"), vision_config=_TOWER),
    "internvl": whole("internvl", _of("qwen2"), vision_config=_TOWER),
    "kimi_k25": whole("kimi_k25", _of("deepseek-v3"), vision_config=_TOWER),
    "lfm2_vl": whole("lfm2_vl", _of("lfm2"), vision_config=_tower("siglip2_vision_model")),
    "lfm3_vl": whole("lfm3_vl", _of("lfm3"), vision_config=_TOWER),
    "lighton_ocr": whole("lighton_ocr", _of("qwen3"), vision_config=_PIXTRAL),
    "llama4": whole(
        "llama4", _of("llama4-text"),
        vision_config=_tower(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
    ),
    "llava": whole("llava", _of("llama"), vision_config=_CLIP),
    "llava_next": whole("llava_next", _of("mistral-window"), vision_config=_CLIP),
    "llava_next_video": whole("llava_next_video", _of("llama"), vision_config=_CLIP),
    "llava_onevision": whole("llava_onevision", _of("qwen2"), vision_config=_SIGLIP),
    "minicpmv4_6": whole("minicpmv4_6", _of("qwen3_5_text"), vision_config=_TOWER),
    "minicpmv4_7": whole("minicpmv4_7", _of("qwen3_5_text"), vision_config=_TOWER),
    "minimax_m3_vl": whole(
        "minimax_m3_vl",
        {
            **FEW_LOCAL, "dense_intermediate_size": 96, "shared_intermediate_size": 48, "rotary_dim": 8,
            "layer_types": 3 * ["full_attention"],
        },
        vision_config=_TOWER, projector_hidden_size=32,
    ),
    "mistral3": whole("mistral3", _of("mistral-window"), vision_config=_PIXTRAL),
    "mistral3-ministral3": whole("mistral3", _of("ministral3"), vision_config=_PIXTRAL),
    "mistral3-mistral4": whole("mistral3", {"model_type": "mistral4", **LATENT, **GROUPED}, vision_config=_PIXTRAL),
    "molmo2": whole(
        "molmo2", {"additional_vocab_size": 0}, vision_config=_tower(image_size=[28, 28]),
        adapter_config=_tower(text_hidden_size=64, vision_feature_layer=[0]),
    ),
    "moss_transcribe_diarize": whole("moss_transcribe_diarize", _of("qwen3"), audio_config=_TOWER),
    "muse_glimmer": whole(
        "muse_glimmer", {"sliding_window": WINDOW, "num_hidden_layers": 5}, vision_config=_TOWER, out_hidden_size=32,
        projector_hidden_size=32,
    ),
    "ovis2": whole("ovis2", _of("qwen2"), vision_config=_TOWER, vocab_size=VOCAB_SIZE, hidden_size=64),
    "paddleocr_vl": whole("paddleocr_vl", _MROPE, vision_config=_TOWER),
    "qianfan_ocr": whole("qianfan_ocr", _of("qwen3"), vision_config=_TOWER),
    "qwen2_5_omni_thinker": whole("qwen2_5_omni_thinker", _MROPE, vision_config=_TOWER, audio_config=_TOWER),
    "qwen2_5_vl": whole("qwen2_5_vl", _MROPE, vision_config=_TOWER),
    "qwen2_audio": whole("qwen2_audio", _of("qwen2"), audio_config=_tower("qwen2_audio_encoder")),
    "qwen2_vl": whole("qwen2_vl", _MROPE, vision_config=_TOWER),
    "qwen3_5": whole("qwen3_5", _of("qwen3_5_text"), vision_config=_TOWER),
    "qwen3_5_moe": whole("qwen3_5_moe", _of("qwen3_5_moe_text"), vision_config=_TOWER),
    "qwen3_asr": whole("qwen3_asr", _of("qwen3"), audio_config=_tower("qwen3_asr_encoder")),
    "qwen3_omni_moe_thinker": whole(
        "qwen3_omni_moe_thinker", {**MOE, **_MROPE}, vision_config=_TOWER, audio_config=_TOWER,
    ),
    "qwen3_vl": whole("qwen3_vl", _MROPE, vision_config=_TOWER),
    "qwen3_vl_moe": whole("qwen3_vl_moe", {**MOE, **_MROPE}, vision_config=_TOWER),
    "smolvlm": whole("smolvlm", _of("llama"), vision_config=_TOWER),
    "video_llama_3": whole("video_llama_3", _of("qwen2"), vision_config=_TOWER),
    "video_llava": whole("video_llava", _of("llama"), vision_config=_CLIP),
    "vipllava": whole("vipllava", _of("llama"), vision_config=_CLIP),
    "voxtral": whole("voxtral", _of("llama"), audio_config=_tower("voxtral_encoder")),
}
# fmt: on

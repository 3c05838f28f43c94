"""What published checkpoints say where transformers' default config of their type says nothing, or something else.

Full-size values, by model type; nested as in the config's file. The survey (:mod:`benchmarks.families`) and the tests
of shrinking lay them over the defaults, so that both see what a hub has.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto import modeling_auto

_SAVED_BY = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
"""Classes by model type; where there are several, that of the last is the one that checkpoints were saved by."""

_MROPE = {"rope_type": "default", "rope_theta": 1e6}
_QWEN_VL: dict[str, Any] = {"rope_parameters": {**_MROPE, "mrope_section": [16, 24, 24]}}
_QWEN3_VL: dict[str, Any] = {
    "rope_parameters": {**_MROPE, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}
_GLM_VL: dict[str, Any] = {
    "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]},
}
_DEEPSEEK_V2: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None,
}  # fmt: skip
_GRANITE_LAYERS = ["full_attention" if at in {5, 15, 25, 35} else "linear_attention" for at in range(40)]
_HUNYUAN: dict[str, Any] = {"head_dim": 128}
_LFM2: dict[str, Any] = {"num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}
_COMPASS: dict[str, Any] = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "sliding_attention": {**_MROPE, "mrope_section": [24, 20, 20]},
        "full_attention": {**_MROPE, "mrope_section": [24, 20, 20]},
    },
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "deepseek_v2": _DEEPSEEK_V2,
    "dots1": {
        "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [22, 22, 20]},
        }
    },
    "glm46v": {"text_config": {**_GLM_VL, "model_type": "glm4v_text"}},
    "glm4v": {"text_config": _GLM_VL},
    "glm4v_moe": {"text_config": {**_GLM_VL, "head_dim": 128}},
    "glm_ocr": {"text_config": {**_QWEN_VL, "head_dim": 128}},
    "glmga": {"text_config": _GLM_VL},
    "granitemoehybrid": {
        "hidden_size": 2048, "num_hidden_layers": 40, "intermediate_size": 8192, "shared_intermediate_size": 8192,
        "num_key_value_heads": 8, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 64,
        "mamba_d_state": 128, "position_embedding_type": "nope", "layer_types": _GRANITE_LAYERS,
    },
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "hunyuan_vl": {
        "text_config": {
            **_HUNYUAN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16] * 4}
        }
    },
    "lfm2": _LFM2,
    "lfm2_moe": {"num_hidden_layers": 8, "layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "lfm2_vl": {"text_config": _LFM2},
    "llama": {
        "num_hidden_layers": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "ministral": {"head_dim": 128},
    "mistral": {"sliding_window": None, "head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "paddleocr_vl": {"text_config": _QWEN_VL},
    "phi3": {
        "hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
            "short_factor": [1.0 + at / 48 for at in range(48)], "long_factor": [1.0 + at for at in range(48)],
        },
    },
    "phimoe": {"sliding_window": 2047},
    "qwen2_5_omni_thinker": {"text_config": _QWEN_VL},
    "qwen2_5_vl": {"text_config": _QWEN_VL},
    "qwen2_vl": {"text_config": _QWEN_VL},
    "qwen3_vl": {"text_config": _QWEN3_VL},
    "qwen3_vl_moe": {"text_config": {**_QWEN3_VL, "norm_topk_prob": True}},
    "step3p7": {"text_config": {"sliding_window": 512}},
}  # fmt: skip


def full_config(model_type: str, **changes: Any) -> Any:
    """The full-size config of *model_type*, as published, with *changes*.

    Raises:
        Exception: what transformers says of a type whose default config cannot be made.
    """
    saved = {name: cls for mapping in _SAVED_BY for name, cls in mapping.items()}.get(model_type)
    said = {} if saved is None else {"architectures": [saved]}
    return transformers.CONFIG_MAPPING[model_type](**{**said, **PUBLISHED.get(model_type, {}), **changes})

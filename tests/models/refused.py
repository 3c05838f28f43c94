"""Small models of families that are refused, of every mechanism that this version cannot run."""

from __future__ import annotations

from typing import Any

from tests.models.sizes import LATENT, MOE, ROUTED, SmallModel, text, whole

_LINEAR_AND_FULL: dict[str, Any] = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
_DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_STATE = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
_INDEX = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}

REFUSED = {
    # recurrent state
    "bamba": text("bamba", **_STATE, attn_layer_indices=[2]),
    "falcon_h1": text("falcon_h1", **_STATE, mamba_d_ssm=128),
    "granitemoehybrid": text(
        "granitemoehybrid", **_STATE, layer_types=["mamba", "mamba", "attention"], num_local_experts=0
    ),
    "lfm2": text("lfm2", layer_types=["conv", "conv", "full_attention"]),
    "nemotron_h": text(
        "nemotron_h",
        hybrid_override_pattern="M*-",
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=1,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
    ),
    "olmo_hybrid": text("olmo_hybrid", **_LINEAR_AND_FULL),
    "qwen3_5_text": text("qwen3_5_text", **_DELTA, **_LINEAR_AND_FULL),
    "qwen3_5_moe_text": text("qwen3_5_moe_text", **MOE, **_DELTA, **_LINEAR_AND_FULL),
    "qwen3_next": text("qwen3_next", **MOE, **_DELTA, **_LINEAR_AND_FULL),
    # sparse attention
    "deepseek_v32": text("deepseek_v32", **LATENT, **ROUTED, **_INDEX),
    "glm_moe_dsa": text("glm_moe_dsa", **LATENT, **ROUTED, **_INDEX),
    # bypasses the interface
    "bloom": text("bloom"),
    "codegen": text("codegen", rotary_dim=8),
    "gpt_neo": text("gpt_neo", attention_types=[[["global"], 3]], num_layers=3),
    "gptj": text("gptj", rotary_dim=8),
    "mpt": text("mpt", d_model=64, n_heads=4, n_layers=3),
}

NOT_ALONE: dict[str, SmallModel] = {
    # encoder-decoders
    "t5": text("t5"),
    "bart": text("bart"),
    # text is seen as a whole, or not without sound
    "paligemma": whole("paligemma", {"model_type": "gemma2"}),
    "voxtral_realtime": whole(
        "voxtral_realtime",
        {"model_type": "voxtral_realtime_text"},
        audio_config={
            "model_type": "voxtral_realtime_encoder",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    ),
}
"""Refused for what their configs say, or because text alone does not go through them."""

"""Language models of which some layers, or all, keep a state for a sequence instead of keys and values.

Convolutions see more than one row, keys are shared by several heads of values where a family has that, and what is
forgotten of a token (see ``make_model``) is little enough for the first one to matter after the longest prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.sizes import FEW_LOCAL, FULL, LATENT, LOCAL, MOE, WINDOW, text

_LINEAR = "linear_attention"
_AROUND_FULL: Mapping[str, Any] = {"layer_types": [_LINEAR, FULL, _LINEAR]}
_DELTA: Mapping[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **_AROUND_FULL,
}
_SPARSE: Mapping[str, Any] = {**_DELTA, **MOE, "shared_expert_intermediate_size": 48}
_CONV: Mapping[str, Any] = {"layer_types": ["conv", FULL, "conv"]}
_MAMBA: Mapping[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 64,
}
_GRANITE: Mapping[str, Any] = {
    **_MAMBA,
    **_AROUND_FULL,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "shared_intermediate_size": 192,
}
_LATENT_AROUND: Mapping[str, Any] = {
    **LATENT,
    **_AROUND_FULL,
    "moe_intermediate_size": 48,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}

# fmt: off
HYBRIDS = {
    "bailing_hybrid": text(
        "bailing_hybrid", **{**_LATENT_AROUND, "head_dim": 16}, num_local_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1,
    ),
    "bamba": text("bamba", **_MAMBA, attn_layer_indices=[1]),
    "falcon_h1": text(
        "falcon_h1", **_MAMBA, mamba_d_ssm=128, key_multiplier=0.5, ssm_multipliers=[1.0, 0.5, 2.0, 1.0, 0.5],
    ),
    "falcon_h1-norm": text("falcon_h1", **_MAMBA, mamba_d_ssm=128, mamba_rms_norm=True),
    "falcon_mamba": text("falcon_mamba", num_hidden_layers=8, state_size=8, time_step_rank=4),
    "granitemoehybrid": text("granitemoehybrid", **_GRANITE, num_local_experts=0),
    "granitemoehybrid-moe": text("granitemoehybrid", **_GRANITE, **FEW_LOCAL, position_embedding_type="rope"),
    "jamba": text(
        "jamba", **FEW_LOCAL, num_experts=4, mamba_d_state=8, mamba_dt_rank=4, attn_layer_period=3, attn_layer_offset=1,
    ),
    "kimi_linear": text("kimi_linear", **_LATENT_AROUND, **FEW_LOCAL, linear_head_dim=16, linear_num_heads=4),
    "lfm2": text("lfm2", **_CONV, conv_bias=True),
    "lfm2_moe": text("lfm2_moe", **_CONV, **MOE, num_dense_layers=1),
    "lfm3": text("lfm3", num_hidden_layers=4, layer_types=["conv", FULL, "conv", LOCAL], sliding_window=WINDOW),
    "mamba": text("mamba", num_hidden_layers=8, state_size=8, time_step_rank=4),
    "mamba2": text("mamba2", num_hidden_layers=8, head_dim=32, state_size=8, num_heads=4, n_groups=2, chunk_size=64),
    "nemotron_h": text(
        "nemotron_h", num_hidden_layers=5, hybrid_override_pattern="M*-ME", mamba_num_heads=4, mamba_head_dim=32,
        ssm_state_size=8, n_groups=2, chunk_size=64, n_routed_experts=12, num_experts_per_tok=2,
        moe_intermediate_size=48, moe_shared_expert_intermediate_size=48,
    ),
    "olmo_hybrid": text("olmo_hybrid", **{**_DELTA, "linear_num_key_heads": 4}),
    "qwen3_5_moe_text": text("qwen3_5_moe_text", **_SPARSE),
    "qwen3_5_text": text("qwen3_5_text", **_DELTA),
    "qwen3_next": text("qwen3_next", **_SPARSE),
}
# fmt: on

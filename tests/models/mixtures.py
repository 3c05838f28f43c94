"""Language models with experts, of which every token passes a few."""

from __future__ import annotations

from tests.models.sizes import (
    FEW_LOCAL,
    FULL,
    GROUPED,
    LATENT,
    LOCAL,
    LOCAL_AND_GLOBAL,
    MOE,
    ROUTED,
    WINDOW,
    YARN,
    text,
)

_SHARED_EXPERT = {"shared_expert_intermediate_size": 48}
_MULTIPLIED = {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
_SPARSE_BUT_ONE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}

# fmt: off
MIXTURES = {
    "afmoe": text("afmoe", **MOE, **LOCAL_AND_GLOBAL, num_shared_experts=1, num_dense_layers=1, mup_enabled=True),
    "aria_text": text("aria_text", moe_num_experts=6, moe_topk=2, moe_num_shared_experts=1),
    "axk1": text("axk1", **LATENT, **GROUPED, n_shared_experts=1, **_SPARSE_BUT_ONE),
    "beam": text(
        "beam", **{**MOE, "num_experts": 8}, **LOCAL_AND_GLOBAL, **_SPARSE_BUT_ONE, n_group=2, topk_group=1,
    ),
    "cohere2_moe": text(
        "cohere2_moe", **MOE, **LOCAL_AND_GLOBAL, **_SPARSE_BUT_ONE, num_shared_experts=1, logit_scale=0.25,
        prefix_dense_intermediate_size=96,
    ),
    "deepseek_v2": text(
        "deepseek_v2", **LATENT, **GROUPED, n_shared_experts=1, first_k_dense_replace=1,
        topk_method="group_limited_greedy",
    ),
    "deepseek-v3": text("deepseek_v3", **LATENT, **GROUPED, n_shared_experts=1, first_k_dense_replace=1),
    "dots1": text("dots1", **GROUPED, n_shared_experts=1, first_k_dense_replace=1, **LOCAL_AND_GLOBAL),
    "ernie4_5_moe": text(
        "ernie4_5_moe", moe_num_experts=6, moe_k=2, moe_intermediate_size=48, moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "exaone_moe": text(
        "exaone_moe", **{**MOE, "num_experts": 8}, **LOCAL_AND_GLOBAL, **_SPARSE_BUT_ONE, n_group=2, topk_group=1,
    ),
    "flex_olmo": text("flex_olmo", num_experts=6, num_experts_per_tok=2),
    "flint": text("flint", **MOE, **_SHARED_EXPERT, **LOCAL_AND_GLOBAL),
    "gemma4-text-moe": text(
        "gemma4_text", **LOCAL_AND_GLOBAL, attention_k_eq_v=True, global_head_dim=32, num_global_key_value_heads=1,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=48,
    ),
    "glm4-moe": text("glm4_moe", **ROUTED),
    "glm4_moe_lite": text("glm4_moe_lite", **LATENT, **ROUTED, n_shared_experts=1, **_SPARSE_BUT_ONE),
    "gpt-oss": text("gpt_oss", **FEW_LOCAL, sliding_window=WINDOW, rope_parameters=YARN),
    "granite-moe": text("granitemoe", **FEW_LOCAL),
    "granitemoe_swa": text(
        "granitemoe_swa", **FEW_LOCAL, **LOCAL_AND_GLOBAL, **_MULTIPLIED, shared_intermediate_size=48,
        layer_rope_theta=[1e4, 1e6, 0],
    ),
    "granitemoeshared": text("granitemoeshared", **FEW_LOCAL, **_MULTIPLIED, shared_intermediate_size=48),
    "hunyuan_v1_moe": text("hunyuan_v1_moe", num_experts=6, moe_topk=2),
    "hy_v3": text("hy_v3", **MOE, num_shared_experts=1, **_SPARSE_BUT_ONE),
    "kolibri1": text("kolibri1", **MOE, **_SHARED_EXPERT, **LOCAL_AND_GLOBAL),
    "laguna": text(
        "laguna", **MOE, **_SHARED_EXPERT, **LOCAL_AND_GLOBAL, num_attention_heads_per_layer=[4, 4, 8],
        moe_routed_scaling_factor=1.5,
    ),
    "llama4-text": text(
        "llama4_text", num_hidden_layers=4, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=48, no_rope_layer_interval=4, floor_scale=32, attn_scale=0.1,
        attn_temperature_tuning=True,
    ),
    "mellum": text("mellum", **MOE, **LOCAL_AND_GLOBAL, **_SPARSE_BUT_ONE),
    "mimo_v2_flash": text(
        "mimo_v2_flash", **GROUPED, **_SPARSE_BUT_ONE, v_head_dim=8, sliding_window=WINDOW,
        layer_types=[FULL, LOCAL, LOCAL],
    ),
    "minimax_m2": text("minimax_m2", **FEW_LOCAL, rotary_dim=8),
    "minimax_m3_vl_text": text(
        "minimax_m3_vl_text", **FEW_LOCAL, dense_intermediate_size=96, shared_intermediate_size=48, rotary_dim=8,
        layer_types=3 * ["full_attention"],
    ),
    "mixtral": text("mixtral", **FEW_LOCAL),
    "olmoe": text("olmoe", num_experts=6, num_experts_per_tok=2),
    "phimoe": text("phimoe", **FEW_LOCAL, attention_bias=True, lm_head_bias=True),
    "phimoe-window": text("phimoe", **FEW_LOCAL, sliding_window=WINDOW),
    "qwen2-moe": text("qwen2_moe", **MOE, **_SHARED_EXPERT),
    "qwen3-moe": text("qwen3_moe", **MOE),
    "solar_open": text("solar_open", **GROUPED, n_shared_experts=1),
}
# fmt: on

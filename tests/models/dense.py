"""Language models of which every token passes all weights."""

from __future__ import annotations

from tests.models.sizes import LATENT, LOCAL_AND_GLOBAL, SHARED_KV, WINDOW, YARN, text

_PLAIN = """
    apertus arcee bitnet gemma helium hyperclovax internlm3 iquestcoder jais2 llama nanochat
    nemotron olmo olmo2 persimmon phi3 qwen3
"""

# fmt: off
DENSE = {
    **{name: text(name) for name in _PLAIN.split()},
    "llama-tied": text("llama", tie_word_embeddings=True),
    "llama3-rope": text(
        "llama",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "biogpt": text("biogpt", max_position_embeddings=192),  # a table of them, which is not cut
    "cohere": text("cohere", logit_scale=0.25, use_qk_norm=True),
    "cohere2": text("cohere2", logit_scale=0.25, sliding_window=WINDOW, num_hidden_layers=5),
    "cwm": text("cwm", **LOCAL_AND_GLOBAL),
    "diffllama": text("diffllama"),
    "ernie4.5": text("ernie4_5"),
    "exaone4": text("exaone4", sliding_window=WINDOW, num_hidden_layers=4),
    "gemma2": text("gemma2", sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3": text("gemma3_text", sliding_window=WINDOW, num_hidden_layers=7, query_pre_attn_scalar=16),
    "gemma3n-text": text(
        "gemma3n_text", **SHARED_KV, laurel_rank=8, activation_sparsity_pattern=[0.9] + 5 * [0.0]
    ),
    "gemma4-text": text(  # keys are values, fewer and longer ones in full layers
        "gemma4_text", **LOCAL_AND_GLOBAL, attention_k_eq_v=True, global_head_dim=32, num_global_key_value_heads=1,
        hidden_size_per_layer_input=0, final_logit_softcapping=30.0,
    ),
    "gemma4-text-inputs": text(  # of each layer, and keys that several layers read
        "gemma4_text", **SHARED_KV, global_head_dim=32, use_double_wide_mlp=True,
    ),
    "gemma4-unified-text": text(
        "gemma4_unified_text", **LOCAL_AND_GLOBAL, attention_k_eq_v=True, global_head_dim=32,
        num_global_key_value_heads=1,
    ),
    "glm": text("glm", partial_rotary_factor=0.5),
    "glm4": text("glm4", partial_rotary_factor=0.5),
    "gpt-neox": text("gpt_neox", tie_word_embeddings=False, num_key_value_heads=4),  # it has no groups
    "gpt_bigcode": text("gpt_bigcode", max_position_embeddings=256),
    "granite": text("granite", logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "granite_swa": text(
        "granite_swa", **LOCAL_AND_GLOBAL, layer_rope_theta=[1e4, 1e6, 0], logits_scaling=2.0, residual_multiplier=0.5
    ),
    "hunyuan_v1_dense": text(
        "hunyuan_v1_dense", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
    ),
    "minicpm3": text("minicpm3", **LATENT, scale_emb=3, dim_model_base=32),
    "ministral": text("ministral", **LOCAL_AND_GLOBAL),
    "ministral3": text(  # a temperature by position, from the 48th token on
        "ministral3",
        rope_parameters={
            **YARN, "original_max_position_embeddings": 48, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
        },
    ),
    "mistral-window": text("mistral", sliding_window=WINDOW),
    "olmo3": text("olmo3", sliding_window=WINDOW, num_hidden_layers=4),
    "opt": text("opt", ffn_dim=96, max_position_embeddings=256),
    "phi": text("phi", partial_rotary_factor=0.5),
    "phi3-window": text("phi3", sliding_window=WINDOW),
    "qwen2": text("qwen2", tie_word_embeddings=True),
    "qwen2-window": text("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "seed-oss": text("seed_oss"),
    "smollm3": text("smollm3", num_hidden_layers=4, no_rope_layer_interval=2),
    "stablelm": text("stablelm", use_qkv_bias=True),
    "starcoder2": text("starcoder2", sliding_window=WINDOW),
    "vaultgemma": text("vaultgemma", **LOCAL_AND_GLOBAL, query_pre_attn_scalar=16),
    "youtu": text("youtu", **LATENT, pad_token_id=None),  # whose row transformers makes zero as it loads
}
# fmt: on

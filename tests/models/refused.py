"""Small models of families that are refused, of every mechanism that this version cannot run."""

from __future__ import annotations

from tests.models.sizes import FEW_LOCAL, LATENT, ROUTED, SmallModel, text, whole

_INDEX = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_SHARING = {"num_hidden_layers": 6, "layer_types": ["linear_attention", "linear_attention", "hybrid"] * 2}

REFUSED = {
    # recurrent state by functions of its own
    "recurrent_gemma": text("recurrent_gemma", lru_width=64, block_types=["recurrent", "attention"]),
    "rwkv": text("rwkv", attention_hidden_size=64),
    # in caches of its own
    "minimax": text("minimax", layer_types=["linear_attention", "full_attention", "linear_attention"], **FEW_LOCAL),
    # several states of a kind in a layer; one for each of its heads
    "zamba": text("zamba", **_SHARING, n_mamba_heads=2),
    # layers share what attends. transformers' own step after a prompt also differs from its whole forward, by 1.4e-3 in
    # log-probabilities: it forgets the limits of time steps that its chunks keep to
    "zamba2": text("zamba2", **_SHARING, n_mamba_heads=4, mamba_d_state=8, use_mem_rope=True),
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

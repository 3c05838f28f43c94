"""Where checkpoints keep their multi-token-prediction heads."""

from __future__ import annotations

from layerstream.checkpoint.mtp_names import head_names


def test_a_head_of_its_own() -> None:
    names = [
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "mtp.fc.weight",
        "mtp.pre_fc_norm_embedding.weight",
        "mtp.pre_fc_norm_hidden.weight",
        "mtp.norm.weight",
        "mtp.layers.0.self_attn.q_proj.weight",
        "mtp.layers.1.self_attn.q_proj.weight",
    ]
    assert head_names(names, 48) == {
        "mtp.fc.weight": "fusion.projection.weight",
        "mtp.pre_fc_norm_embedding.weight": "fusion.embedding_norm.weight",
        "mtp.pre_fc_norm_hidden.weight": "fusion.hidden_norm.weight",
        "mtp.norm.weight": "norm.weight",
        "mtp.layers.0.self_attn.q_proj.weight": "layers.0.self_attn.q_proj.weight",
    }


def test_a_head_behind_the_last_layer() -> None:
    names = [
        "model.layers.60.input_layernorm.weight",
        "model.layers.61.input_layernorm.weight",
        "model.layers.61.eh_proj.weight",
        "model.layers.61.enorm.weight",
        "model.layers.61.hnorm.weight",
        "model.layers.61.shared_head.norm.weight",
        "model.layers.61.shared_head.head.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.mlp.experts.7.up_proj.weight_scale_inv",
    ]
    assert head_names(names, 61) == {
        "model.layers.61.input_layernorm.weight": "layers.0.input_layernorm.weight",
        "model.layers.61.eh_proj.weight": "fusion.projection.weight",
        "model.layers.61.enorm.weight": "fusion.embedding_norm.weight",
        "model.layers.61.hnorm.weight": "fusion.hidden_norm.weight",
        "model.layers.61.shared_head.norm.weight": "norm.weight",
        "model.layers.61.mlp.experts.7.up_proj.weight_scale_inv": "layers.0.mlp.experts.7.up_proj.weight_scale_inv",
    }


def test_none() -> None:
    assert head_names(["model.layers.3.mlp.up_proj.weight", "model.norm.weight"], 3) == {}
    assert head_names(["mtp.0.something.weight"], 3) == {}, "of another layout"
    assert head_names(["model.layers.61.eh_proj.weight"], 60) == {}

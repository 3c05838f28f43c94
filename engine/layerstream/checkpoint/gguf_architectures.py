"""The architectures of GGUF files: a row each, for what llama.cpp's converter made of a transformers model.

A row says which family a file is of, which metadata say which field of its config, what llama.cpp takes for granted
where they say nothing, and what the converter did to weights beside renaming them. Keys are those of the gguf package,
without the architecture's name in front; what they mean is in llama.cpp's ``conversion`` and ``src/models``.
To add one: a row here, and a row in tests/reference/test_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerstream.checkpoint.gguf import ROPE_FACTORS, GgufFile, read_floats
from layerstream.errors import UnsupportedModel

Fields = dict[str, Any]
SIGMOID = 2  # llama.cpp's number of that gating function
_LEADING = "leading_dense_block_count"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of them, or one of the families that an architecture stands for.

    Attributes:
        name: as llama.cpp calls it.
        family: transformers' ``model_type``.
        when: whether a file of the architecture is of this family; the first row that says so counts.
        keys: fields of the config, and the metadata that say them, beside those that all families have.
        flags: fields of the config, and the tensor of the first layer that is there if they are true.
        taken: fields where metadata say nothing.
        rope: the same of rotary parameters.
        derive: fields that are computed.
        period: every so many layers one attends to everything, the others within a window; 0: no such pattern.
        local: the name of those others in the config.
        local_theta: base of their rotary frequencies, where the family has one for each kind of layer; 0: the file's.
        is_latent: whether attention is over latents.
        swaps_heads: whether the halves of rotary heads are interleaved.
        norm_offset: what was added to the weights of norms.
        transposes_experts: whether the model has experts as (in, out).
        alternates: whether the model has gate and up by turns, and the file one after the other.
        neutral: metadata that change nothing for text.
        ignores: names of tensors in a layer that no model of the family computes with, though files have them.
    """

    name: str
    family: str
    when: Callable[[GgufFile], bool] = lambda file: True
    keys: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    taken: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    derive: Callable[[GgufFile, Fields], Fields] = lambda file, fields: {}
    period: int = 0
    local: str = "sliding_attention"
    local_theta: float | None = None
    is_latent: bool = False
    swaps_heads: bool = False
    norm_offset: float = 0.0
    transposes_experts: bool = False
    alternates: bool = False
    neutral: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()


_SECTIONS = frozenset({"rope.dimension_sections"})  # of positions in time, height and width, which text has equal


def _experts(count: str) -> dict[str, str]:
    """Fields of a mixture of experts, the first of which has a name in each family."""
    return {
        count: "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    }


_ROUTED = _experts("n_routed_experts") | {
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": _LEADING,
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
_ROUTED_TAKEN = {
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "first_k_dense_replace": 0,
}  # fmt: skip
_BIASED = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_down.bias"}
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GRANITE_TAKEN = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
_SOFT_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_NORM_EPS = "attention.layer_norm_epsilon"
_LATENT = {"q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank"}


def _has(key: str) -> Callable[[GgufFile], bool]:
    return lambda file: bool(file.said(key))


def _is_gated_by_sigmoid(file: GgufFile) -> bool:
    """Some files do not say so; those have what corrects the gates' choice."""
    return file.said("expert_gating_func") == SIGMOID or any(".exp_probs_b" in name for name in file.tensors)


def _by_largest(num_layers: int) -> Callable[[GgufFile, Fields], Fields]:
    """Of Gemma, whose largest model, known by its layers, scales queries by the width and not by its heads'."""

    def derive(file: GgufFile, fields: Fields) -> Fields:
        is_largest = fields["num_hidden_layers"] == num_layers
        scale = fields["hidden_size"] // fields["num_attention_heads"] if is_largest else fields["head_dim"]
        return {"query_pre_attn_scalar": scale}

    return derive


def _latent_heads(file: GgufFile, fields: Fields) -> Fields:
    """Files count the heads of latents, of which there is one; files from before that, those of the model."""
    rotary = file.said("rope.dimension_count")
    key_length = file.said("attention.key_length_mla") or file.said("attention.key_length")
    return {
        "head_dim": rotary,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key_length - rotary,
        "v_head_dim": file.said("attention.value_length_mla") or file.said("attention.value_length"),
        "num_key_value_heads": fields["num_attention_heads"],
        "q_lora_rank": file.said("attention.q_lora_rank"),
    }


def _deepseek_v2(file: GgufFile, fields: Fields) -> Fields:
    method = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
    return _latent_heads(file, fields) | {"topk_method": method}


def _granite(file: GgufFile, fields: Fields) -> Fields:
    return {} if "attention_multiplier" in fields else {"attention_multiplier": fields["head_dim"] ** -0.5}


def _llama4(file: GgufFile, fields: Fields) -> Fields:
    has_windows = file.said("attention.sliding_window") != 0
    return {
        "use_qk_norm": file.said("expert_count") != 128,
        "attn_temperature_tuning": has_windows,
        "no_rope_layers": None if has_windows else [1] * fields["num_hidden_layers"],
    }


def _ministral3(file: GgufFile, fields: Fields) -> Fields:
    return {"rope_parameters": fields["rope_parameters"] | {"llama_4_scaling_beta": file.said(_TEMPERATURE)}}


def _gemma4(file: GgufFile, fields: Fields) -> Fields:
    """Layers that attend to everything have other heads, and rotate a part of them: files say so by factors that let
    the rest stand still. Layers that read another one's keys may have a wider MLP."""
    kinds = fields["layer_types"]
    whole = kinds.index("full_attention")
    by_layer = {name: _per_layer(file, key, len(kinds)) for name, key in _GEMMA4_LAYERS.items()}
    local = by_layer["num_key_value_heads"][kinds.index(_LOCAL) if _LOCAL in kinds else whole]
    width = by_layer["intermediate_size"]
    head_dim = file.said("attention.key_length_swa", fields["head_dim"])
    table = file.tensors.get("per_layer_token_embd.weight")
    factors = file.tensors.get(ROPE_FACTORS)
    moving = 1.0 if factors is None else float((read_floats(factors) < _STILL).float().mean())
    return {
        "head_dim": head_dim,
        "global_head_dim": fields["head_dim"],
        "num_key_value_heads": local,
        "num_global_key_value_heads": by_layer["num_key_value_heads"][whole],
        "attention_k_eq_v": f"blk.{whole}.attn_v.weight" not in file.tensors,
        "intermediate_size": width[0],
        "use_double_wide_mlp": width[-1] == 2 * width[0],
        "vocab_size_per_layer_input": fields["vocab_size"] if table is None else table.shape[0],
        "enable_moe_block": bool(file.said("expert_count")),
        "rope_parameters": {
            _LOCAL: fields["rope_parameters"][_LOCAL]
            | {"partial_rotary_factor": file.said("rope.dimension_count_swa", head_dim) / head_dim},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": file.said("rope.freq_base"),
                "partial_rotary_factor": moving,
            },
        },
    }


def _per_layer(file: GgufFile, key: str, count: int) -> list[int]:
    said = file.said(key)
    return said if isinstance(said, list) else [said] * count


_LOCAL = "sliding_attention"
_STILL = 1e20  # factors from there on let a frequency stand still
_GEMMA4_LAYERS = {"num_key_value_heads": "attention.head_count_kv", "intermediate_size": "feed_forward_length"}
_GEMMA4 = {
    "final_logit_softcapping": "final_logit_softcapping",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "num_experts": "expert_count",
    "top_k_experts": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_TEMPERATURE = "attention.temperature_scale"
_QWEN_MOE = _experts("num_experts") | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
_MIXTRAL = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_LLAMA4 = _MIXTRAL | {
    "intermediate_size_mlp": "feed_forward_length",
    "intermediate_size": "expert_feed_forward_length",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
}
_LLAMA4_TAKEN = {
    "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "no_rope_layer_interval": 4,
}  # fmt: skip

ROWS = (
    Architecture("llama", "mixtral", when=_has("expert_count"), keys=_MIXTRAL, swaps_heads=True),
    Architecture("llama", "llama", flags=_BIASED, swaps_heads=True),
    Architecture("mistral3", "ministral3", when=_has(_TEMPERATURE), derive=_ministral3, swaps_heads=True),
    Architecture("mistral3", "mistral", swaps_heads=True),
    Architecture(
        "llama4",
        "llama4_text",
        keys=_LLAMA4,
        taken=_LLAMA4_TAKEN,
        derive=_llama4,
        period=4,
        local="chunked_attention",
        transposes_experts=True,
    ),
    Architecture("arcee", "arcee", flags=_BIASED, swaps_heads=True),
    Architecture("smollm3", "smollm3", flags=_BIASED, taken={"no_rope_layer_interval": 4}, swaps_heads=True),
    Architecture(
        "granite", "granite", keys=_GRANITE, flags=_BIASED, taken=_GRANITE_TAKEN, derive=_granite, swaps_heads=True
    ),
    Architecture(
        "granitemoe",
        "granitemoeshared",
        when=_has("expert_shared_feed_forward_length"),
        keys=_GRANITE | _MIXTRAL | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
        taken=_GRANITE_TAKEN,
        derive=_granite,
        swaps_heads=True,
    ),
    Architecture(
        "granitemoe", "granitemoe", keys=_GRANITE | _MIXTRAL, taken=_GRANITE_TAKEN, derive=_granite, swaps_heads=True
    ),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen2vl", "qwen2", neutral=_SECTIONS),
    Architecture("qwen2moe", "qwen2_moe", keys=_QWEN_MOE, taken={"norm_topk_prob": False}),
    Architecture("qwen3", "qwen3", flags={"attention_bias": "attn_q.bias"}),
    Architecture("qwen3vl", "qwen3", neutral=_SECTIONS),
    Architecture("qwen3moe", "qwen3_moe", keys=_experts("num_experts"), taken={"norm_topk_prob": True}),
    Architecture(
        "qwen3vlmoe",
        "qwen3_moe",
        keys=_experts("num_experts"),
        taken={"norm_topk_prob": True},
        neutral=_SECTIONS,
    ),
    Architecture("seed_oss", "seed_oss", flags=_BIASED | {"attention_out_bias": "attn_output.bias"}),
    Architecture("gemma", "gemma", norm_offset=1.0),
    Architecture(
        "gemma2",
        "gemma2",
        keys=_SOFT_CAPS,
        taken={"sliding_window": 4096},
        derive=_by_largest(46),
        period=2,
        norm_offset=1.0,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        keys={"final_logit_softcapping": "final_logit_softcapping"},
        derive=_by_largest(62),
        period=6,
        local_theta=10_000.0,
        norm_offset=1.0,
    ),
    Architecture(
        "gemma4",
        "gemma4_text",
        keys=_GEMMA4,
        derive=_gemma4,
        period=6,
        local_theta=10_000.0,
        ignores=frozenset({"attn_k.weight", "attn_v.weight", "attn_k_norm.weight"}),
    ),
    Architecture("phi2", "phi", keys={"layer_norm_eps": _NORM_EPS}),
    Architecture("phi3", "phi3", keys={"original_max_position_embeddings": "rope.scaling.original_context_length"}),
    Architecture("glm4", "glm4", flags=_BIASED),
    Architecture(
        "glm4moe",
        "glm4_moe",
        keys=_ROUTED,
        flags={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
        taken=_ROUTED_TAKEN,
    ),
    Architecture(
        "deepseek2",
        "deepseek_v3",
        when=_is_gated_by_sigmoid,
        keys=_ROUTED | _LATENT,
        taken=_ROUTED_TAKEN,
        derive=_latent_heads,
        is_latent=True,
    ),
    Architecture(
        "deepseek2",
        "deepseek_v2",
        keys=_ROUTED | _LATENT,
        taken=_ROUTED_TAKEN,
        derive=_deepseek_v2,
        is_latent=True,
    ),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        keys=_MIXTRAL | {"intermediate_size": "expert_feed_forward_length"},
        flags={"attention_bias": "attn_q.bias"},
        rope={"truncate": False},
        period=2,
        transposes_experts=True,
        alternates=True,
    ),
    Architecture("olmo", "olmo", keys={"clip_qkv": "attention.clamp_kqv"}, swaps_heads=True),
    Architecture("olmo2", "olmo3", when=_has("attention.sliding_window"), period=4, local_theta=0.0),
    Architecture("olmo2", "olmo2"),
    Architecture(
        "olmoe",
        "olmoe",
        keys={"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        taken={"norm_topk_prob": False},
    ),
    Architecture(
        "command-r",
        "cohere",
        keys={"layer_norm_eps": _NORM_EPS, "logit_scale": "logit_scale"},
        flags={"use_qk_norm": "attn_q_norm.weight"},
    ),
    Architecture("cohere2", "cohere2", keys={"layer_norm_eps": _NORM_EPS, "logit_scale": "logit_scale"}, period=4),
    Architecture("ernie4_5", "ernie4_5", flags={"use_bias": "attn_q.bias"}),
    Architecture("exaone4", "exaone4", period=4),
    Architecture(
        "stablelm",
        "stablelm",
        keys={"layer_norm_eps": _NORM_EPS, "use_parallel_residual": "use_parallel_residual"},
        flags={"use_qkv_bias": "attn_q.bias"},
    ),
    Architecture("starcoder2", "starcoder2", keys={"norm_epsilon": _NORM_EPS}, flags={"use_bias": "attn_q.bias"}),
)
SUPPORTED = tuple(sorted({row.name for row in ROWS}))

_RECURRENT = frozenset(
    """
    arwkv7 falcon-h1 granitehybrid jamba kimi-linear lfm2 lfm2moe mamba mamba2 nemotron_h nemotron_h_moe plamo2 qwen35
    qwen35moe qwen3next rwkv6 rwkv6qwen2 rwkv7
    """.split()
)
_NO_DECODER = frozenset(
    """
    bert clip eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llama-embed modern-bert neo-bert nomic-bert
    nomic-bert-moe t5 t5encoder wavtokenizer-dec
    """.split()
)


def architecture_of(file: GgufFile) -> Architecture:
    """The row of *file*.

    Raises:
        UnsupportedModel: there is none, with the reason.
    """
    name = file.architecture
    row = next((row for row in ROWS if row.name == name and row.when(file)), None)
    if row is not None:
        return row
    if name in _RECURRENT:
        reason = "it keeps recurrent state, and LayerStream streams models whose only state is attention's"
    elif name in _NO_DECODER:
        reason = "it is no decoder that generates text"
    else:
        reason = (
            "what its converter made of weights and config is not known here; use the safetensors original, or one of "
            f"{', '.join(SUPPORTED)}"
        )
    raise UnsupportedModel(f"{file.path}: a GGUF file of architecture {name!r}: {reason}")

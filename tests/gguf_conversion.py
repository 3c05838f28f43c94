"""What llama.cpp's converter writes for a model, after its ``conversion`` package: metadata, and parts of parameters.

Parts are views of the parameters that they come from, so that whoever rounds them can put back what they became.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch


@dataclass(frozen=True)
class Part:
    """A stored tensor: its name, the *view* of a parameter that it has the values of, its shape where that is another,
    and what the converter adds."""

    name: str
    view: torch.Tensor
    shape: tuple[int, ...] = ()
    offset: float = 0.0


PERMUTING = {"llama", "mistral3", "arcee", "smollm3", "granite", "granitemoe", "olmo"}
SHIFTING = {"gemma", "gemma2", "gemma3"}


def write_metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    """As ``TextModel.set_gguf_parameters`` and what the architecture's class adds."""
    rope = config.rope_parameters or {}
    whole = rope.get("full_attention", rope)
    if architecture == "gemma4":
        config = copy.deepcopy(config)
        config.allow_global_per_layer_attribute_access = True  # as the converter does, which reads the file
    head_dim = getattr(config, "head_dim", None)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture != "deepseek2":
        writer.add_head_count_kv(config.num_key_value_heads)
        if head_dim is not None and architecture != "granite":
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
    writer.add_rope_freq_base(whole.get("rope_theta", 1e4))
    if (local := rope.get("sliding_attention")) is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    _write_scaling(writer, whole)
    for name, add in (
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("layer_norm_eps", writer.add_layer_norm_eps),
        ("norm_epsilon", writer.add_layer_norm_eps),
        ("num_experts_per_tok", writer.add_expert_used_count),
    ):
        if (value := getattr(config, name, None)) is not None:
            add(value)
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    if count := next((count for count in counts if count), None):
        writer.add_expert_count(count)
    if getattr(config, "n_group", None):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    _MORE.get(architecture, lambda writer, config: None)(writer, config)


def _write_scaling(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])


def _partial(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)))


def _window(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)


def _pattern(writer: gguf.GGUFWriter, config: Any) -> None:
    _window(writer, config)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    _partial(writer, config)
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def _granite(writer: gguf.GGUFWriter, config: Any) -> None:
    _partial(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _routed(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


def _glm4_moe(writer: gguf.GGUFWriter, config: Any) -> None:
    _partial(writer, config)
    _routed(writer, config)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _deepseek2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_head_count_kv(1)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    _routed(writer, config)
    if config.model_type == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if over_all := config.rope_parameters.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * over_all)


def _llama4(writer: gguf.GGUFWriter, config: Any) -> None:
    _partial(writer, config)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _mistral3(writer: gguf.GGUFWriter, config: Any) -> None:
    _partial(writer, config)
    rope = config.rope_parameters
    if config.model_type == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _gpt_oss(writer: gguf.GGUFWriter, config: Any) -> None:
    _window(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    _window(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _moe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _cohere(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _cohere2(writer: gguf.GGUFWriter, config: Any) -> None:
    _cohere(writer, config)
    _window(writer, config)


def _stablelm(writer: gguf.GGUFWriter, config: Any) -> None:
    _partial(writer, config)
    writer.add_parallel_residual(config.use_parallel_residual)


def _gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    _pattern(writer, config)
    shared, count = config.num_kv_shared_layers, config.num_hidden_layers
    whole = config.per_layer_config["full_attention"]
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    writer.add_key_length(whole.head_dim)
    writer.add_value_length(whole.head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count(whole.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    if config.moe_intermediate_size:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_used_count(config.top_k_experts)
    if config.use_double_wide_mlp:
        width = config.intermediate_size
        writer.add_feed_forward_length([width * (1 + (layer >= count - shared)) for layer in range(count)])
    heads = {"sliding_attention": config.num_key_value_heads, "full_attention": whole.num_key_value_heads}
    writer.add_head_count_kv([heads[kind] for kind in config.layer_types])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


_MORE: dict[str, Callable[[gguf.GGUFWriter, Any], None]] = {
    "llama": _partial, "arcee": _partial, "smollm3": _partial, "mistral3": _mistral3, "llama4": _llama4,
    "granite": _granite, "granitemoe": _granite, "qwen2moe": _moe, "qwen3moe": _moe, "qwen3vlmoe": _moe,
    "gemma2": _gemma2, "gemma3": _window, "phi2": _partial, "phi3": _phi3, "glm4": _partial, "glm4moe": _glm4_moe,
    "deepseek2": _deepseek2, "gpt-oss": _gpt_oss, "command-r": _cohere, "cohere2": _cohere2, "exaone4": _pattern,
    "stablelm": _stablelm, "gemma4": _gemma4, "olmo": lambda writer, config: writer.add_clamp_kqv(config.clip_qkv),
    "olmo2": lambda writer, config: _pattern(writer, config) if config.model_type == "olmo3" else None,
}  # fmt: skip


def rope_factors(reference: Any) -> dict[str, np.ndarray]:
    """The tensors that stand for rotary scaling."""
    rope = reference.config.rope_parameters or {}
    whole = rope.get("full_attention", rope)
    if whole.get("rope_type") == "proportional":
        head_dim = reference.config.per_layer_config["full_attention"].head_dim
        moving = int(head_dim * whole["partial_rotary_factor"] / 2)
        return {"rope_freqs.weight": np.float32([1.0] * moving + [1e30] * (head_dim // 2 - moving))}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{name}.weight": np.float32(rope[f"{name}_factor"]) for name in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    frequencies = reference.model.rotary_emb.inv_freq
    head_dim = 2 * len(frequencies)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    return {"rope_freqs.weight": (plain / frequencies).numpy().astype(np.float32)}


_SPECIAL = {
    "e_score_correction_bias": "exp_probs_b.bias",
    "self_attn.sinks": "attn_sinks.weight",
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
}


def stored_parts(
    name: str, tensor: torch.Tensor, architecture: str, config: Any, names: gguf.TensorNameMap
) -> Iterator[Part]:
    """Under which names *tensor* is stored, and which part of it each is."""
    stem, _, leaf = name.rpartition(".")
    layer = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
    if name.endswith("kv_b_proj.weight"):
        heads = tensor.view(config.num_attention_heads, -1, tensor.shape[1])
        yield Part(f"{layer}.attn_k_b.weight", heads[:, : config.qk_nope_head_dim].transpose(1, 2))
        yield Part(f"{layer}.attn_v_b.weight", heads[:, config.qk_nope_head_dim :])
    elif stem.endswith(".experts"):
        yield from _expert_parts(layer, leaf, tensor, architecture)
    elif special := next((found for end, found in _SPECIAL.items() if name.endswith(end)), ""):
        yield Part(f"{layer}.{special}", tensor)
    elif architecture in PERMUTING and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        by_halves = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2)
        yield Part(f"{names.get_name(stem)}.{leaf}", by_halves, tuple(tensor.shape))
    else:
        offset = 1.0 if architecture in SHIFTING and name.endswith("norm.weight") else 0.0
        yield Part(f"{names.get_name(stem)}.{leaf}", tensor, offset=offset)


def _expert_parts(layer: str, leaf: str, tensor: torch.Tensor, architecture: str) -> Iterator[Part]:
    suffix = "bias" if leaf.endswith("_bias") else "weight"
    if suffix == "weight" and architecture in {"gpt-oss", "llama4"}:
        tensor = tensor.transpose(1, 2)
    if leaf.startswith("down_proj"):
        yield Part(f"{layer}.ffn_down_exps.{suffix}", tensor)
        return
    if architecture == "gemma4":
        yield Part(f"{layer}.ffn_gate_up_exps.{suffix}", tensor)
        return
    half = tensor.shape[1] // 2
    by_turns = architecture == "gpt-oss"
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if by_turns else (slice(0, half), slice(half, None))
    yield Part(f"{layer}.ffn_gate_exps.{suffix}", tensor[:, gate])
    yield Part(f"{layer}.ffn_up_exps.{suffix}", tensor[:, up])

"""Writes small models as GGUF, with the gguf package, as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

Kind = gguf.GGMLQuantizationType


def draw_blocks(kind: Kind, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random blocks ``(rows, bytes)`` of any type, with scales that are ordinary numbers."""
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // values, num_bytes), dtype=np.uint8)
    if kind in {Kind.F32, Kind.F16, Kind.BF16}:
        numbers = rng.standard_normal((rows, columns)).astype(np.float32) * 0.2
        return gguf.quants.quantize(numbers, kind).view(np.uint8).reshape(rows, -1)
    for offset in _SCALES.get(kind, (0,)):
        scales = (rng.random(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == Kind.MXFP4:
        blocks[:, 0] = rng.integers(118, 124, len(blocks))
    return blocks.reshape(rows, -1)


_SCALES = {  # where a block has its fp16 scales
    Kind.Q4_1: (0, 2),
    Kind.Q5_1: (0, 2),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.MXFP4: (),
}


def write_gguf(
    path: Path, reference: Any, architecture: str, kind: Kind, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Write *reference* with its matrices in *kind*, and give it the values that these stand for."""
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters or {}
    writer.add_rope_freq_base(rope.get("full_attention", rope).get("rope_theta", 1e4))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_pad_token_id(0)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if rope.get("rope_type") == "llama3":
        frequencies = reference.model.rotary_emb.inv_freq
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies).numpy().astype(np.float32))
    if experts := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if architecture != "llama":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_tokenizer(writer, tokenizer)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            for found, part in _parts(name, tensor, names):
                is_matrix = part.dim() > 1 and "norm" not in name and "ffn_gate_inp" not in found
                chosen = kind if is_matrix else Kind.F32
                part.copy_(_write(writer, found, part, chosen, name, architecture, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _parts(name: str, tensor: torch.Tensor, names: Any) -> list[tuple[str, torch.Tensor]]:
    """Under which names *tensor* is stored, and which part of it each is."""
    stem, _, leaf = name.rpartition(".")
    if stem.endswith(".experts"):
        layer = name.split(".")[2]
        if leaf == "down_proj":
            return [(f"blk.{layer}.ffn_down_exps.weight", tensor)]
        half = tensor.shape[1] // 2
        return [
            (f"blk.{layer}.ffn_gate_exps.weight", tensor[:, :half]),
            (f"blk.{layer}.ffn_up_exps.weight", tensor[:, half:]),
        ]
    return [(f"{names.get_name(stem)}.{leaf}", tensor)]


def _write(
    writer: gguf.GGUFWriter, found: str, tensor: torch.Tensor, kind: Kind, name: str, architecture: str, config: Any
) -> torch.Tensor:
    """Write *tensor* as llama.cpp wants it; what it stands for, as transformers wants it."""
    stored = tensor.to(torch.float32)
    heads = None
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        stored = stored.reshape(heads, 2, -1, *stored.shape[1:]).transpose(1, 2).reshape(stored.shape)
    offset = 1.0 if architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0
    stored = stored + offset
    data = gguf.quants.quantize(np.ascontiguousarray(stored.numpy()), kind)
    writer.add_tensor(found, data, raw_dtype=kind)
    values = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32)).reshape(stored.shape) - offset
    if heads is not None:
        values = values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    return values


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token, _ in vocab]
    )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)

"""Writes small models as GGUF, with the gguf package, as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from tests.gguf_conversion import Part, rope_factors, stored_parts, write_metadata

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
    path: Path,
    reference: Any,
    architecture: str,
    kind: Kind,
    tokenizer: PreTrainedTokenizerFast | None = None,
    pre: str = "default",
) -> None:
    """Write *reference* with its matrices in *kind*, and give it the values that these stand for. *pre*: how the
    tokenizer splits text."""
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, config, architecture)
    for name, factors in rope_factors(reference).items():
        writer.add_tensor(name, factors)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_pad_token_id(0)
    else:
        _add_tokenizer(writer, tokenizer, pre)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            for part in stored_parts(name, tensor, architecture, config, names):
                is_matrix = tensor.dim() > 1 and "norm" not in name and "ffn_gate_inp" not in part.name
                _write(writer, part, kind if is_matrix and part.name.endswith(".weight") else Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write(writer: gguf.GGUFWriter, part: Part, kind: Kind) -> None:
    """Write *part*, and put where it comes from what it stands for in the file."""
    values = part.view.to(torch.float32).reshape(part.shape or part.view.shape) + part.offset
    data = gguf.quants.quantize(np.ascontiguousarray(values.numpy()), kind)
    writer.add_tensor(part.name, data, raw_dtype=kind)
    stored = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    part.view.copy_(stored.reshape(part.view.shape) - part.offset)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, pre: str) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
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

"""Writes a checkpoint of a real model's shape with random weights: what sweeps of it cost, and no answers.

    python -m benchmarks.random_checkpoint SHAPE OUT [--layers N] [--quantization nf4|int8|int4]

SHAPE is Gemma-4-26B-A4B, Gemma-4-31B, Qwen3-VL-8B, Qwen3.5-4B, Qwen3.6-27B or Qwen3.6-35B-A3B, by the names that their
checkpoints have, or a config.json of any model that transformers knows. Towers for pictures and sound are left out, as
LayerStream reads nothing of them.

These shapes are not grown (:mod:`benchmarks.grow`), because none of them can be the reader's function. They norm every
query and key by its own length: of ``Wx / rms(x)`` they keep the direction alone, and in the reader that length decides
how sharply a head attends. No weights bring it back. Gemma 4 norms values in the same way.

One matrix, or one expert of a block, is in memory at a time. ``--quantization`` writes Linears as ``layerstream pack``
does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from layerstream.checkpoint.codecs.encode import Encoder, make_encoder
from layerstream.checkpoint.writer import ShardWriter, dtype_name
from layerstream.model.anatomy import body_modules, build_own, dissect
from layerstream.model.module_sizes import is_plain_linear
from layerstream.setup.pack_items import fused_keys

from benchmarks.grow import _COPIED, READER

DTYPE = torch.bfloat16
STD = 0.02
PART_ROWS = 4096

_QWEN_3_5 = {
    "vocab_size": 248320, "head_dim": 256, "linear_num_key_heads": 16,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
    },
}  # fmt: skip
_GEMMA_4 = {"vocab_size": 262144, "head_dim": 256, "final_logit_softcapping": 30.0, "sliding_window": 1024}
SHAPES: dict[str, dict[str, Any]] = {
    "Gemma-4-26B-A4B": {
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA_4, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
            "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
            "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
            "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
        },
    },
    "Gemma-4-31B": {
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA_4, "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
            "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
            "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
        },
    },
    "Qwen3.5-4B": {
        "model_type": "qwen3_5_text",
        **_QWEN_3_5, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "linear_num_value_heads": 32, "tie_word_embeddings": True,
    },
    "Qwen3.6-27B": {
        "model_type": "qwen3_5_text",
        **_QWEN_3_5, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64,
        "num_attention_heads": 24, "num_key_value_heads": 4, "linear_num_value_heads": 48,
    },
    "Qwen3.6-35B-A3B": {
        "model_type": "qwen3_5_moe_text",
        **_QWEN_3_5, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
        "linear_num_value_heads": 32, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "Qwen3-VL-8B": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
    },
}  # fmt: skip


def config_of(shape: dict[str, Any], num_layers: int | None = None) -> Any:
    """transformers' config of *shape*, with its first *num_layers* layers."""
    shape = json.loads(json.dumps(shape))
    text = shape.get("text_config", shape)
    if num_layers is not None:
        text["num_hidden_layers"] = num_layers
        for name in ("layer_types", "mlp_layer_types"):
            if name in text:
                text[name] = text[name][:num_layers]
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    config.dtype = DTYPE
    return config


def write(shape: dict[str, Any], out: Path, num_layers: int | None = None, quantization: str | None = None) -> Path:
    """Write a random checkpoint of *shape* to the folder *out*, with a tokenizer, and return it."""
    out.mkdir(parents=True, exist_ok=True)
    config = config_of(shape, num_layers)
    model = build_own(config, dtype=DTYPE)
    config.architectures = [type(model).__name__]
    anatomy = dissect(model)
    names = {module: name for name, module in model.named_modules()}
    encoder = None if quantization is None else make_encoder(quantization)
    linears = {f"{name}.weight" for module, name in names.items() if is_plain_linear(module)}
    linears -= {f"{names[anatomy.head]}.weight"}
    if encoder is not None and encoder.format.packs_experts:
        linears |= fused_keys(model)
    places = [f"{names[module]}." for module in body_modules(anatomy)]
    groups: dict[str, dict[str, torch.Tensor]] = {}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name not in tied:
            groups.setdefault(next((p for p in places if name.startswith(p)), ""), {})[name] = tensor
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        packed = {name for name in tensors if encoder and name in linears and encoder.can(*tensors[name].shape[-2:])}
        written = _write(out / file, tensors, packed, encoder, seed=number)
        weight_map |= dict.fromkeys(written, file)
        total += (out / file).stat().st_size
        print(f"{number}/{len(groups)} {file} {total / 1e9:.1f} GB")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    said = config.to_dict()
    if encoder is not None:
        said["quantization_config"] = encoder.config([names[anatomy.head]])
    (out / "config.json").write_text(json.dumps(said, indent=2))
    for name in _COPIED:
        if name != "generation_config.json":
            shutil.copyfile(READER / name, out / name)
    return out


def _write(
    path: Path, tensors: dict[str, torch.Tensor], packed: set[str], encoder: Encoder | None, seed: int
) -> list[str]:
    """Write random tensors of the shapes of *tensors*; the names of what was written."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {}
    for name, tensor in tensors.items():
        if encoder is not None and name in packed:
            shapes |= {n: (dtype_name(d), s) for n, d, s in encoder.planes(name, tuple(tensor.shape), DTYPE)}
        else:
            shapes[name] = (dtype_name(DTYPE), tuple(tensor.shape))
    with ShardWriter(path, shapes) as shard:
        for name, tensor in tensors.items():
            parts = _draw(name, tensor, chance)
            if encoder is None or name not in packed:
                shard.write(name, parts)
                continue
            rows = (part.flatten(0, -2) for part in parts)
            for plane, values in encoder.encode(name, tuple(tensor.shape), DTYPE, rows):
                shard.write(plane, values)
    return list(shapes)


def _draw(name: str, like: torch.Tensor, chance: torch.Generator) -> Iterator[torch.Tensor]:
    """Random values of the shape of *like*, some rows or one expert at a time; around 1 for what scales."""
    if like.dim() < 2:
        yield torch.ones(like.shape, dtype=DTYPE) if "bias" not in name else torch.zeros(like.shape, dtype=DTYPE)
        return
    step = 1 if like.dim() > 2 else PART_ROWS
    for first in range(0, len(like), step):
        rows = min(step, len(like) - first)
        yield torch.empty(rows, *like.shape[1:], dtype=DTYPE).normal_(std=STD, generator=chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="a name, or a config.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer of them than the shape has")
    parser.add_argument("--quantization", choices=("nf4", "int8", "int4"))
    options = parser.parse_args()
    shape = SHAPES.get(options.shape) or json.loads(Path(options.shape).read_text("utf-8"))
    write(shape, options.out, options.layers, options.quantization)


if __name__ == "__main__":
    main()

"""Folders with quantised weights, as their owners write them, and plain models with the same weights decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

Packer = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""From a matrix to what is stored of it, by the name behind its module's, and what that stands for."""


def write_quantised(folder: Path, reference: Any, pack: Packer, quantisation: dict[str, Any], *, leave: str) -> None:
    """Quantise the Linears of *reference* but its head and those with *leave* in their names; it gets their values."""
    stored: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name and leave not in name:
                planes, values = pack(module.weight.data)
                stored |= {f"{name}.{suffix}": plane.contiguous() for suffix, plane in planes.items()}
                stored |= {} if module.bias is None else {f"{name}.bias": module.bias.data.clone()}
                module.weight.copy_(values)
    quantised = {key.rpartition(".")[0] for key in stored}
    for name, tensor in reference.state_dict().items():
        if name.rpartition(".")[0] not in quantised:
            stored[name] = tensor.clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))


def pack_int32(codes: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes of 0…15 along *dim* in one int32; code ``order[i]`` of them in bits ``4 i`` and on."""
    groups = codes.to(torch.int64).unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    words = sum(groups[..., number] << (4 * position) for position, number in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _grouped(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``(rows, columns)``, zero points and scales ``(rows, groups)``: asymmetric, by minimum and maximum."""
    parts = weight.unflatten(1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / 15).to(torch.float16).to(torch.float32)
    zero = (-low / scale).round().clamp(1, 15)
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes.flatten(1), zero, scale


def _values(codes: torch.Tensor, zero: torch.Tensor | float, scale: torch.Tensor) -> torch.Tensor:
    group = codes.shape[1] // scale.shape[1]
    zeros = zero.repeat_interleave(group, 1) if isinstance(zero, torch.Tensor) else zero
    return (codes - zeros) * scale.repeat_interleave(group, 1)


def gptq(weight: torch.Tensor, group: int = 32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """GPTQ's first format, with columns in order."""
    codes, zero, scale = _grouped(weight, group)
    planes = {
        "qweight": pack_int32(codes.T, 0),
        "qzeros": pack_int32(zero.T - 1, 1),
        "scales": scale.T.to(torch.float16),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
    }
    return planes, _values(codes, zero, scale)


def awq(weight: torch.Tensor, group: int = 32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """AWQ's ``gemm`` layout."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zero, scale = _grouped(weight, group)
    planes = {
        "qweight": pack_int32(codes.T, 1, order),
        "qzeros": pack_int32(zero.T, 1, order),
        "scales": scale.T.to(torch.float16),
    }
    return planes, _values(codes, zero, scale)


def compressed(
    weight: torch.Tensor, group: int = 32, *, symmetric: bool = False
) -> tuple[dict[str, torch.Tensor], Any]:
    """compressed-tensors' ``pack-quantized``."""
    codes, zero, scale = _grouped(weight, group)
    planes = {
        "weight_packed": pack_int32(codes, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if symmetric:
        return planes, _values(codes, 8.0, scale)
    return planes | {"weight_zero_point": pack_int32(zero, 0)}, _values(codes, zero, scale)


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int] = (48, 40)) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """FP8 with a scale for each block of the matrix; the last ones are smaller where blocks do not divide it."""
    high, wide = block
    rows, columns = weight.shape
    scale = torch.stack([torch.stack([p.abs().amax() for p in r.split(wide, 1)]) for r in weight.split(high, 0)]) / 448
    of_values = scale[torch.arange(rows)[:, None] // high, torch.arange(columns)[None] // wide]
    codes = (weight / of_values).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.to(torch.float32) * of_values


def fp8_rows(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """FP8 with a scale for each row, as compressed-tensors has it."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.to(torch.float32) * scale


PACKERS: dict[str, tuple[Packer, dict[str, Any]]] = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "compressed-int4": (compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "compressed-int4-symmetric": (
        lambda weight: compressed(weight, symmetric=True),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "compressed-fp8": (fp8_rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [48, 40]}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
}


def write_bitsandbytes(source: Path, folder: Path, **options: Any) -> None:
    """What ``save_pretrained`` makes of the model in *source*, loaded with ``BitsAndBytesConfig(**options)``."""
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)

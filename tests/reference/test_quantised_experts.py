"""Experts that are stored quantised: logits and greedy tokens of plain transformers with the same weights, fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layerstream.errors import InvalidHeader, UnsupportedFormat
from layerstream.setup.config import EngineConfig
from layerstream.setup.pack import pack
from layerstream.setup.plan_model import plan_model
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from benchmarks.accuracy import decoded
from tests.crossing import crossed
from tests.harness import STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import make_model
from tests.quantised import PACKERS, Packer

TOLERANCE = 1e-4  # of the largest logit
MODES = ["resident", "tight", "layers", "device-host"]
SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}


def _compare(folder: Path, reference: Any, mode: str, tokenizer_folder: Path) -> None:
    add_tokenizer(folder, tokenizer_folder)
    prompts = [draw_prompt(length) for length in (70, 5)]
    run = run_greedily(config_for(folder, mode), prompts)
    assert run.streams == (mode in STREAMING)
    assert_equals(run, reference, prompts, TOLERANCE)


def _write(folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any] | None, source: Path) -> None:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config |= {} if quantisation is None else {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))


def _gpt_oss(folder: Path) -> Any:
    """A folder as gpt-oss is published, and the model that it stands for."""
    reference = make_model("gpt-oss", folder / "plain")
    random = torch.Generator().manual_seed(0)
    stored = load_file(folder / "plain" / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=random)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            reference.get_parameter(name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    _write(folder / "packed", stored, {"quant_method": "mxfp4", "modules_to_not_convert": []}, folder / "plain")
    return reference


@pytest.mark.parametrize("mode", MODES)
def test_gpt_oss_as_it_is_published(mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    _compare(tmp_path / "packed", _gpt_oss(tmp_path), mode, tokenizer_folder)


def test_blocks_without_scales_are_named(tmp_path: Path) -> None:
    _gpt_oss(tmp_path)
    path = tmp_path / "packed" / "model.safetensors"
    stored = load_file(path)
    del stored["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(stored, path)
    with pytest.raises(InvalidHeader, match=r"layers\.1\.mlp\.experts\.down_proj_blocks.*down_proj_scales"):
        plan_model(EngineConfig(str(tmp_path / "packed")))


def _one_by_one(family: str, pack_matrix: Packer, quantisation: dict[str, Any], folder: Path) -> Any:
    """A folder whose experts are quantised one by one, and the model with those values."""
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "moe_intermediate_size")}
    make_model(family, folder / "plain", sizes=sizes if family != "mixtral" else {"hidden_size": 128})
    plain = load_file(folder / "plain" / "model.safetensors")
    stored = dict(plain)
    for name, tensor in plain.items():
        if ".experts." in name and tensor.dim() == 2:
            planes, plain[name] = pack_matrix(tensor)
            del stored[name]
            stem = name.removesuffix(".weight")
            stored |= {f"{stem}.{suffix}": plane for suffix, plane in planes.items()}
    assert len(stored) > len(plain)
    _write(folder / "packed", stored, quantisation, folder / "plain")
    _write(folder / "values", plain, None, folder / "plain")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "values", dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    ("family", "kind", "mode"), crossed(["qwen3-moe", "mixtral"], ["fp8", "compressed-int4"], MODES)
)
def test_experts_one_by_one(family: str, kind: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    reference = _one_by_one(family, *PACKERS[kind], tmp_path)
    _compare(tmp_path / "packed", reference, mode, tokenizer_folder)


def test_formats_whose_matrices_cannot_be_stacked_are_named(tmp_path: Path) -> None:
    _one_by_one("qwen3-moe", *PACKERS["awq"], tmp_path)
    with pytest.raises(UnsupportedFormat, match=r"is stored as awq, and would have to be joined"):
        plan_model(EngineConfig(str(tmp_path / "packed")))


@pytest.mark.parametrize("mode", MODES)
def test_int4_packs_experts(mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model("qwen3-moe", tmp_path / "plain", sizes={**SIZES, "num_hidden_layers": 6})
    report = pack(tmp_path / "plain", tmp_path / "packed", "int4")
    assert report.packed_bytes < 0.4 * report.source_bytes
    values = load_file(tmp_path / "plain" / "model.safetensors") | decoded(tmp_path / "packed")
    _write(tmp_path / "values", values, None, tmp_path / "plain")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "values", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    _compare(tmp_path / "packed", reference, mode, tokenizer_folder)

"""What a quantization_config says decides before a tensor is looked at: read exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream.checkpoint.folder import open_folder
from layerstream.checkpoint.schemes import CompressedScheme, check_gptq, compressed_scheme, group_size
from layerstream.errors import InvalidHeader, UnsupportedFormat
from safetensors.torch import save_file

from tests import quantised

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
BLOCKS = {"strategy": "block", "block_structure": [128, 64]}
FP8_INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
INT8_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def scheme(form: str | None, *weights: dict[str, Any] | None, **more: Any) -> CompressedScheme:
    groups = {f"group_{n}": {"targets": ["Linear"], "weights": item, **more} for n, item in enumerate(weights)}
    return compressed_scheme({"format": form, "config_groups": groups})


@pytest.mark.parametrize(
    ("form", "weights", "more"),
    [
        ("int-quantized", {**INT4, "num_bits": 8, "strategy": "channel"}, {"input_activations": INT8_INPUTS}),
        ("int-quantized", {**INT4, "num_bits": 8, "strategy": "channel"}, {}),
        ("naive-quantized", {**INT4, "num_bits": 8, "strategy": "channel"}, {}),
        ("pack-quantized", {**INT4, "num_bits": 8}, {}),
        ("pack-quantized", {**INT4, "num_bits": 2}, {}),
        ("pack-quantized", {**INT4, "num_bits": "4"}, {}),
        ("pack-quantized", {**INT4, "type": "float"}, {}),
        ("pack-quantized", {**INT4, "strategy": "block"}, {}),
        ("pack-quantized", {**INT4, "strategy": "tensor"}, {}),
        ("pack-quantized", {**INT4, "strategy": "tensor_group"}, {}),
        ("pack-quantized", {**INT4, "dynamic": True}, {}),
        ("pack-quantized", INT4, {"input_activations": INT8_INPUTS}),
        ("pack-quantized", INT4, {"output_activations": FP8_INPUTS}),
        ("nvfp4-pack-quantized", {**FP8, "num_bits": 4, "strategy": "tensor_group", "group_size": 16}, {}),
        ("mxfp4-pack-quantized", {**FP8, "num_bits": 4, "strategy": "group", "group_size": 32}, {}),
        ("float-quantized", {**FP8, "num_bits": 4}, {}),
        ("float-quantized", {**FP8, "type": "int"}, {}),
        ("float-quantized", {**FP8, "symmetric": False}, {}),
        ("float-quantized", {**FP8, "strategy": "group", "group_size": 128}, {}),
        ("marlin-24", INT4, {}),
        ("sparse-24-bitmask", FP8, {}),
        ("mixed-precision", {**INT4, "num_bits": 8}, {}),
        ("pack-quantized", INT4, {"format": "int-quantized"}),
        (None, {**INT4, "num_bits": 8}, {}),
    ],
)
def test_what_is_not_read_is_refused_with_what_to_do(form: str | None, weights: Any, more: Any) -> None:
    with pytest.raises(UnsupportedFormat, match="use a version of the model in FP8, in 4-bit integers"):
        scheme(form, weights, **more)
    with pytest.raises(UnsupportedFormat):
        scheme(form, FP8 if form is None else None, weights, **more)


@pytest.mark.parametrize(
    ("form", "weights", "more", "expected"),
    [
        ("pack-quantized", [INT4], {}, CompressedScheme((), frozenset({128}))),
        ("pack-quantized", [INT4, {**INT4, "group_size": 32}], {}, CompressedScheme((), frozenset({32, 128}))),
        ("pack-quantized", [{**INT4, "strategy": "channel", "group_size": None}], {}, CompressedScheme()),
        ("pack-quantized", [{**INT4, "symmetric": False}], {}, CompressedScheme((), frozenset({128}))),
        ("pack-quantized", [INT4], {"input_activations": FP8_INPUTS}, CompressedScheme((), frozenset({128}))),
        ("float-quantized", [FP8], {"input_activations": FP8_INPUTS}, CompressedScheme()),
        ("naive-quantized", [{**FP8, "strategy": "tensor"}], {}, CompressedScheme()),
        ("float-quantized", [{**FP8, **BLOCKS}], {}, CompressedScheme(((128, 64),))),
        ("float-quantized", [{**FP8, **BLOCKS, "block_structure": "128x64"}], {}, CompressedScheme(((128, 64),))),
        ("mixed-precision", [INT4, FP8], {}, CompressedScheme((), frozenset({128}))),
        ("float-quantized", [None], {}, CompressedScheme()),
    ],
)  # fmt: skip
def test_what_is_read(form: str, weights: list[Any], more: Any, expected: CompressedScheme) -> None:
    assert scheme(form, *weights, **more) == expected


@pytest.mark.parametrize(
    ("quantisation", "error"),
    [
        ({"format": "int-quantized"}, UnsupportedFormat),
        ({"format": "pack-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedFormat),
        ({"format": "pack-quantized", "transform_config": {"config_groups": {"u": {}}}}, UnsupportedFormat),
        ({"config_groups": ["x"]}, InvalidHeader),
        ({"config_groups": {"g": "x"}}, InvalidHeader),
        ({"config_groups": {"g": {"weights": 4}}}, InvalidHeader),
        ({"format": "pack-quantized", "config_groups": {"g": {"weights": {**INT4, "group_size": 0}}}}, InvalidHeader),
        (
            {"format": "float-quantized", "config_groups": {"g": {"weights": {**FP8, "strategy": "block"}}}},
            InvalidHeader,
        ),
    ],
)
def test_what_makes_no_sense_is_named(quantisation: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        compressed_scheme(quantisation)


@pytest.mark.parametrize(
    "said", [{"checkpoint_format": "marlin"}, {"pack_dtype": "int16"}, {"dynamic": {"+:lm_head": {"bits": 8}}}]
)
def test_other_layouts_of_gptq_are_refused(said: dict[str, Any]) -> None:
    check_gptq({"checkpoint_format": "gptq_v2", "pack_dtype": "int32", "dynamic": {"-:.*gate": {}}})
    with pytest.raises(UnsupportedFormat):
        check_gptq(said)


@pytest.mark.parametrize("size", [0, -2, True, "128", 1.5, None, [128]])
def test_odd_group_sizes_are_named(size: Any) -> None:
    assert group_size({"group_size": -1}, 96) == 96
    with pytest.raises(InvalidHeader, match="group_size"):
        group_size({"group_size": size}, 96)


METHODS = ["hqq", "quanto", "aqlm", "eetq", "torchao", "higgs", "fbgemm_fp8", "vptq", "spqr", "bitnet", "quark",
           "auto-round", "modelopt", "fp_quant", "", None, 7, ["gptq"]]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_with_what_to_do(tmp_path: Path, method: Any) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
    with pytest.raises(UnsupportedFormat, match="or the 16-bit original"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "packer", "said"),
    [
        ("quantize_config.json", quantised.gptq, {"bits": 4, "group_size": 32, "desc_act": False}),
        ("quant_config.json", quantised.awq, {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}),
    ],
)
def test_what_the_quantising_tool_wrote_beside_the_model_counts(
    tmp_path: Path, name: str, packer: Any, said: dict[str, Any]
) -> None:
    planes, _ = packer(torch.randn(16, 64))
    save_file({f"a.{key}": plane.contiguous() for key, plane in planes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(said))
    assert open_folder(tmp_path).packed["a.weight"].shape == (16, 64)


def test_bitsandbytes_without_its_name(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    assert sorted(open_folder(tmp_path).tensors) == ["a.weight"]


def test_groups_of_another_size_than_the_config_says_are_refused(tmp_path: Path) -> None:
    """96 columns in groups of 64 have two scales; even division would take groups of 48."""
    planes, _ = quantised.compressed(torch.randn(8, 96), 48, symmetric=True)
    save_file({f"a.{key}": plane.contiguous() for key, plane in planes.items()}, tmp_path / "model.safetensors")
    groups = {"g": {"targets": ["Linear"], "weights": {**INT4, "group_size": 64}}}
    quantisation = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantisation}))
    with pytest.raises(InvalidHeader, match="groups of 64"):
        open_folder(tmp_path)

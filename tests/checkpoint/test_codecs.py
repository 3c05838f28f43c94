"""Every codec against its owner's dequantiser, bit for bit, and cut anywhere it may be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given
from hypothesis import strategies as st
from layerstream.checkpoint.codecs.base import Codec
from layerstream.checkpoint.codecs.bnb import Bnb4, BnbInt8
from layerstream.checkpoint.codecs.fp8 import Fp8
from layerstream.checkpoint.codecs.int4 import Awq, CompressedInt4, Gptq
from layerstream.checkpoint.folder import open_folder
from layerstream.errors import InvalidHeader, UnsupportedFormat
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests import quantised


def decode(codec: Codec, planes: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    codec.decode(planes, 0, out)
    return out


def check_cuts(codec: Codec, planes: dict[str, torch.Tensor], shape: tuple[int, int], whole: torch.Tensor) -> None:
    """Parts of the rows are the same as the rows of the whole, also parts of parts."""
    step = codec.row_step
    if not step or shape[0] < 2 * step or shape[0] % step:
        return
    middle = shape[0] // 2 // step * step
    upper = codec.cut(planes, shape[0], middle, shape[0])
    part = torch.empty((shape[0] - middle, shape[1]), dtype=whole.dtype)
    codec.decode(upper, middle, part)
    assert torch.equal(part, whole[middle:])
    last = torch.empty((step, shape[1]), dtype=whole.dtype)
    codec.decode(codec.cut(upper, len(part), len(part) - step, len(part)), shape[0] - step, last)
    assert torch.equal(last, whole[-step:])


@given(
    st.integers(2, 70),
    st.sampled_from([2, 48, 64, 96, 128, 320]),
    st.sampled_from(["nf4", "fp4"]),
    st.booleans(),
    st.sampled_from([64, 128]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bitsandbytes_4bit(
    rows: int, columns: int, kind: str, nested: bool, blocksize: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows + columns)
    weight = torch.randn(rows, columns)
    data, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    stored = state.as_dict(packed=True)
    facts = json.loads(bytes(stored.pop(f"quant_state.bitsandbytes__{kind}").tolist()))
    codec = Bnb4(kind, columns, blocksize, (facts["nested_blocksize"], facts["nested_offset"]) if nested else None)
    planes = {"weight": data, **stored}
    assert {name: tuple(plane.shape) for name, plane in planes.items()} == codec.expected(rows, columns)
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    values = _dequantize_4bit_compute(data.view(-1), absmax, state.code, blocksize, weight.shape, torch.float32)
    expected = values.to(dtype)
    if columns % blocksize == 0:  # else the kernel for the CPU reads scales of other rows (0.50)
        assert torch.equal(expected, bnb.functional.dequantize_4bit(data, state).to(dtype))
    found = decode(codec, planes, (rows, columns), dtype)
    assert torch.equal(found, expected)
    check_cuts(codec, planes, (rows, columns), found)


@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bitsandbytes_int8(rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows + columns)
    values, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(rows, columns).to(torch.float16))
    planes = {"weight": values, "SCB": scales}
    found = decode(BnbInt8(), planes, (rows, columns), dtype)
    assert torch.equal(found, bnb.functional.int8_vectorwise_dequant(values, scales).to(dtype))
    check_cuts(BnbInt8(), planes, (rows, columns), found)


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 16, 32]), st.sampled_from(["F32", "BF16", "U8"]))
def test_fp8_blocks(block_rows: int, block_columns: int, block: int, scale_dtype: str) -> None:
    torch.manual_seed(block_rows)
    shape = block_rows * block, block_columns * block
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(block_rows, block_columns) + 0.1
    if scale_dtype == "U8":
        scale = torch.randint(120, 130, (block_rows, block_columns), dtype=torch.uint8)
    elif scale_dtype == "BF16":
        scale = scale.to(torch.bfloat16)
    expected = Fp8Dequantize(None)._dequantize_one(values, scale, torch.float32)
    codec = Fp8(shape[0], (block, block))
    planes = {"weight": values, "scale": scale}
    found = decode(codec, planes, shape, torch.float32)
    assert torch.equal(found, expected)
    check_cuts(codec, planes, shape, found)


@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.data())
def test_fp8_is_the_formula_wherever_blocks_end(
    rows: int, columns: int, high: int, wide: int, count: int, data: st.DataObject
) -> None:
    """``value[i, j] * scale[i // b0, j // b1]``, of one matrix or several, of all rows or of any of them."""
    torch.manual_seed(rows + columns)
    grid = -(-rows // high), -(-columns // wide)
    values = torch.randn(count * rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(count * grid[0], grid[1]) + 0.1
    numbers = torch.arange(count * rows)
    of_rows = numbers // rows * grid[0] + numbers % rows // high
    expected = values.to(torch.float32) * scale[of_rows][:, torch.arange(columns) // wide]
    codec = Fp8(rows, (high, wide)).stacked(count)
    assert codec is not None
    planes = {"weight": values, "scale": scale}
    assert {name: tuple(plane.shape) for name, plane in planes.items()} == codec.expected(count * rows, columns)
    assert torch.equal(decode(codec, planes, tuple(values.shape), torch.float32), expected)
    start = data.draw(st.integers(0, count * rows - 1))
    stop = data.draw(st.integers(start + 1, count * rows))
    part = torch.empty(stop - start, columns)
    codec.decode(codec.cut(planes, count * rows, start, stop), start, part)
    assert torch.equal(part, expected[start:stop])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (5, 1)])
def test_fp8_with_a_scale_for_each_row_or_for_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values, scale = torch.randn(5, 8).to(torch.float8_e4m3fn), torch.rand(shape) + 0.1
    tensors = {"a.weight": values, "a.weight_scale": scale}
    folder = _folder(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": None})
    codec = open_folder(folder).packed["a.weight"].codec
    found = decode(codec, {"weight": values, "scale": scale}, (5, 8), torch.float32)
    assert torch.equal(found, values.to(torch.float32) * scale.reshape(-1, 1))


@pytest.mark.parametrize(
    ("shape", "grid", "said"),
    [
        ((112, 64), (4, 2), {"weight_block_size": [28, 32]}),  # even division would take [32, 32]
        ((576, 256), (5, 2), {}),  # DeepSeek-V3's kv_a_proj, ragged: [128, 128] where the config does not say
        ((130, 130), (2, 2), {}),
        ((64, 64), (1, 1), {}),
        ((40, 40), (40, 1), {}),  # a scale for each row
    ],
)
def test_fp8_takes_the_blocks_that_the_config_names(
    tmp_path: Path, shape: tuple[int, int], grid: tuple[int, int], said: dict[str, Any]
) -> None:
    tensors = {"a.weight": torch.zeros(shape).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(grid)}
    codec = open_folder(_folder(tmp_path, tensors, {"quant_method": "fp8", **said})).packed["a.weight"].codec
    assert isinstance(codec, Fp8)
    named = (40, 40) if grid == (40, 1) else tuple(said.get("weight_block_size", (128, 128)))
    assert codec.block == ((1, 40) if grid == (40, 1) else tuple(map(min, named, shape)))


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ((4, 2), {"weight_block_size": [32, 64]}),
        ((2, 4), {"weight_block_size": [32, 32]}),
        ((4, 2), {"weight_block_size": None}),
        ((4, 2), {}),
        ((4, 2), {"weight_block_size": [0, 32]}),
        ((4, 2), {"weight_block_size": "x"}),
        ((4, 2), {"weight_block_size": [32]}),
        ((0, 0), {"weight_block_size": [32, 32]}),
    ],
)
def test_fp8_scales_of_other_blocks_are_refused(tmp_path: Path, grid: tuple[int, int], said: dict[str, Any]) -> None:
    tensors = {"a.weight": torch.zeros(112, 64).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(grid)}
    with pytest.raises(InvalidHeader, match=r"blocks of|weight_block_size"):
        open_folder(_folder(tmp_path, tensors, {"quant_method": "fp8", **said}))


def test_planes_of_another_dtype_are_named(tmp_path: Path) -> None:
    planes, _ = quantised.gptq(torch.randn(16, 64))
    planes["qweight"] = planes["qweight"].to(torch.float32)
    tensors = {f"a.{name}": plane.contiguous() for name, plane in planes.items()}
    folder = _folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(InvalidHeader, match=r"'a.qweight' has dtype F32; gptq needs I32"):
        open_folder(folder)


@pytest.mark.parametrize("rows", [8, 24, 64])
@pytest.mark.parametrize("group", [32, 64])
def test_groups_of_4_bits(rows: int, group: int) -> None:
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
    cases: list[tuple[Any, Codec, dict[str, str]]] = [
        (quantised.gptq, Gptq(group), {"weight": "qweight", "scale": "scales", "zero": "qzeros", "g_idx": "g_idx"}),
        (quantised.awq, Awq(group), {"weight": "qweight", "scale": "scales", "zero": "qzeros"}),
        (
            quantised.compressed,
            CompressedInt4(group, is_symmetric=False),
            {"weight": "weight_packed", "scale": "weight_scale", "zero": "weight_zero_point"},
        ),
    ]
    for pack, codec, names in cases:
        stored, values = pack(weight, group)
        planes = {plane: stored[name] for plane, name in names.items()}
        assert {name: tuple(plane.shape) for name, plane in planes.items()} == codec.expected(rows, 128)
        found = decode(codec, planes, (rows, 128), torch.float32)
        assert torch.equal(found, values), codec.name
        assert (found - weight).abs().max() < 0.5
        check_cuts(codec, planes, (rows, 128), found)


def _folder(path: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> Path:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantisation}))
    return path


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"a.weight": torch.zeros(2, 2)}, {"quant_method": "hqq"})
    with pytest.raises(UnsupportedFormat, match=r"'hqq'.*awq, bitsandbytes, compressed-tensors, fp8, gptq"):
        open_folder(folder)


def test_scales_of_the_wrong_shape_are_named(tmp_path: Path) -> None:
    planes, _ = quantised.gptq(torch.randn(16, 64))
    planes["scales"] = planes["scales"][:1]
    tensors = {f"a.{name}": plane.contiguous() for name, plane in planes.items()}
    folder = _folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(InvalidHeader, match=r"'a.scales' has shape \[1, 16\]; .* needs \[2, 16\]"):
        open_folder(folder)


def test_missing_planes_are_named(tmp_path: Path) -> None:
    planes, _ = quantised.awq(torch.randn(16, 64))
    del planes["qzeros"]
    tensors = {f"a.{name}": plane.contiguous() for name, plane in planes.items()}
    folder = _folder(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": 32})
    with pytest.raises(InvalidHeader, match=r"a\.qzeros"):
        open_folder(folder)


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    data, state = bnb.functional.quantize_4bit(torch.randn(4, 64), quant_type="nf4")
    stored = {f"a.weight.{name}": plane for name, plane in state.as_dict(packed=True).items()}
    stored["a.weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(b'{"shape": 3}'), dtype=torch.uint8)
    folder = _folder(tmp_path, {"a.weight": data, **stored}, {"quant_method": "bitsandbytes"})
    with pytest.raises(InvalidHeader, match="no quantisation state"):
        open_folder(folder)

"""On a device a quantised matrix takes a few operators, however large it is and however many rows there are.

Counted on a pretended one, whose kernels for 4 bits are stood in for by one operator each. What is decoded there has
the bits that the processor decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import gguf
import pytest
import torch
from layerstream.checkpoint.codecs.base import Codec
from layerstream.checkpoint.codecs.bnb import Bnb4, BnbInt8
from layerstream.checkpoint.codecs.ggml import Ggml
from layerstream.checkpoint.codecs.int4 import Awq, CompressedInt4, Gptq
from layerstream.checkpoint.codecs.tiled import TiledInt4
from layerstream.checkpoint.codecs.tiled_ggml import TiledGgml
from layerstream.model.linear import DEVICE_TILE_VALUES, LinearSlice, PackedMatrix, Rows, SlicedLinear, tile_rows

from tests import pretend_bits
from tests.launches import Launches
from tests.pretend import PretendCuda, pretend_cuda

ROWS, COLUMNS = 512, 1024

CODECS: dict[str, tuple[Codec, int]] = {
    "nf4": (Bnb4("nf4", COLUMNS), 1),
    "nf4, nested scales": (Bnb4("nf4", COLUMNS, nested=(256, 0.25)), 3),
    "fp4": (Bnb4("fp4", COLUMNS), 1),
    "int8": (BnbInt8(), 2),
    "int4": (TiledInt4(64), 3),
    "compressed-tensors": (CompressedInt4(32, is_symmetric=True), 4),
    "compressed-tensors, zero points": (CompressedInt4(32, is_symmetric=False), 7),
    "GPTQ": (Gptq(32, in_order=True), 8),
    "AWQ": (Awq(32), 7),
    "Q4_0": (Ggml(gguf.GGMLQuantizationType.Q4_0), 6),
    "Q4_0 in tiles": (TiledGgml(), 4),
    "Q4_1 in tiles": (TiledGgml(has_lowest=True), 4),
    "Q4_K": (Ggml(gguf.GGMLQuantizationType.Q4_K), 13),
    "Q5_1": (Ggml(gguf.GGMLQuantizationType.Q5_1), 11),
    "Q6_K": (Ggml(gguf.GGMLQuantizationType.Q6_K), 13),
    "Q8_0": (Ggml(gguf.GGMLQuantizationType.Q8_0), 3),
}
"""And how many operators decode a matrix."""

FUSED = {"nf4", "nf4, nested scales", "fp4"}
"""A kernel multiplies by them as they are stored."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with pretend_cuda(monkeypatch) as device, device.use(), torch.inference_mode():
        yield device


def planes_of(codec: Codec) -> dict[str, torch.Tensor]:
    """Anything that is stored so, scales of a sensible size."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    in_fp32 = {"SCB", "quant_map", "nested_absmax", "nested_quant_map"} | (set() if _is_nested(codec) else {"absmax"})
    for name, shape in codec.expected(ROWS, COLUMNS).items():
        stored = codec.dtypes.get(name, frozenset({"F16"}))
        if name in in_fp32:
            found[name] = torch.rand(shape, generator=generator)
        elif name == "g_idx":
            found[name] = torch.arange(COLUMNS, dtype=torch.int32) // 32
        elif name == "scale":
            found[name] = torch.rand(shape, generator=generator).to(torch.float16)
        elif "I32" in stored:
            found[name] = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        elif "I8" in stored:
            found[name] = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        else:
            found[name] = torch.randint(0, 120, shape, generator=generator).to(torch.uint8)
    if isinstance(codec, Bnb4):
        found["quant_map"] = pretend_bits.table_of(codec.name)
    if type(codec) is TiledInt4:
        found["scale"] = found["scale"].to(torch.bfloat16)
    return found


def _is_nested(codec: Codec) -> bool:
    return isinstance(codec, Bnb4) and codec.nested is not None


def linear_of(codec: Codec, device: torch.device) -> SlicedLinear:
    """A Linear with such a matrix there."""
    planes = {name: plane.to(device) for name, plane in planes_of(codec).items()}
    values = tile_rows(codec, ROWS, COLUMNS, DEVICE_TILE_VALUES) * COLUMNS
    scratch = torch.empty(values, dtype=torch.bfloat16, device=device)
    fused = codec.device_rows(planes, 0, (ROWS, COLUMNS), torch.bfloat16)
    matrix = PackedMatrix(codec, planes, 0, ROWS, COLUMNS, scratch, fused)
    return SlicedLinear([LinearSlice(0, ROWS, lambda: nullcontext((matrix, None)))])


@pytest.mark.parametrize("kind", CODECS)
def test_operators_for_a_matrix(kind: str, card: PretendCuda) -> None:
    codec, decoding = CODECS[kind]
    linear = linear_of(codec, card.torch_device)
    for num_rows in (1, 8, 32, 128):
        inputs = torch.ones((num_rows, COLUMNS), dtype=torch.bfloat16, device=card.torch_device)
        linear.project(inputs, [Rows(0, num_rows, num_rows)])  # constants are made, kernels are tried
        with Launches() as launches:
            linear.project(inputs, [Rows(0, num_rows, num_rows)])
        is_fused = kind in FUSED and num_rows <= pretend_bits.FUSED_ROWS
        assert launches.total == (1 if is_fused else decoding + 1), launches.by_name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CODECS)
def test_the_processor_decodes_the_same_bits(kind: str, dtype: torch.dtype, card: PretendCuda) -> None:
    codec, _ = CODECS[kind]
    planes = planes_of(codec)
    there = {name: plane.to(card.torch_device) for name, plane in planes.items()}
    for decode in (codec.decode, codec.decode_arranged):
        here, found = (_room(codec, dtype, device) for device in (torch.device("cpu"), card.torch_device))
        decode(planes, 0, here)
        decode(there, 0, found)
        torch.testing.assert_close(found.cpu(), here, rtol=0, atol=0, equal_nan=True)


def _room(codec: Codec, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    values = torch.empty(ROWS * COLUMNS, dtype=dtype, device=device)
    return values.view(COLUMNS, ROWS).T if codec.columns_first else values.view(ROWS, COLUMNS)


@pytest.mark.parametrize("kind", sorted(FUSED))
def test_the_product_is_that_with_what_is_decoded(kind: str, card: PretendCuda) -> None:
    codec, _ = CODECS[kind]
    linear = linear_of(codec, card.torch_device)
    inputs = torch.randn((32, COLUMNS), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    rows = Rows(0, 32, 32)
    found = linear.project(inputs.to(card.torch_device), [rows]).cpu()
    values = _room(codec, torch.bfloat16, torch.device("cpu"))
    codec.decode(planes_of(codec), 0, values)
    torch.testing.assert_close(found, inputs @ values.T, rtol=0.01, atol=0.5)


@pytest.mark.parametrize("first", [0, 16, 37])
def test_rows_in_the_middle_have_their_own_scales(first: int, card: PretendCuda) -> None:
    codec = CODECS["nf4, nested scales"][0]
    planes = planes_of(codec)
    inputs = torch.randn((4, COLUMNS), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    whole = torch.empty((ROWS, COLUMNS), dtype=torch.bfloat16)
    codec.decode(planes, 0, whole)
    part = {name: plane.to(card.torch_device) for name, plane in codec.cut(planes, ROWS, first, ROWS).items()}
    found = codec.product(part, inputs.to(card.torch_device), first)
    torch.testing.assert_close(found.cpu(), inputs @ whole[first:].T, rtol=0.01, atol=0.5)

"""The int4 format: torch's kernel reads it as it lies, and matrices of other formats are the same in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layerstream.checkpoint.codecs.base import Codec, Planes
from layerstream.checkpoint.codecs.encode import quantise_groups
from layerstream.checkpoint.codecs.ggml import Ggml
from layerstream.checkpoint.codecs.int4 import Awq, CompressedInt4, Gptq
from layerstream.checkpoint.codecs.tiled import (
    TiledInt4,
    by_kernel,
    rewrite,
    staying_shapes,
    tile_codes,
    tile_scales,
    tiled,
    tiled_bytes,
)
from layerstream.checkpoint.codecs.tiled_ggml import tile_blocks, tiled_ggml

from tests import quantised
from tests.checkpoint.test_codecs import check_cuts, decode
from tests.gguf_files import Kind, draw_blocks

HAS_WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"
needs_kernel = pytest.mark.skipif(not HAS_WIDE_VECTORS, reason="torch's int4 kernel has another layout here")


def draw(rows: int, columns: int, group: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Planes as they are stored, and the values by the formula."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=random)
    scale, offset = (torch.rand((rows, columns // group), generator=random).to(torch.bfloat16) for _ in range(2))
    spread = [part.float().repeat_interleave(group, 1) for part in (scale, offset)]
    return {"weight": tile_codes(codes), "scale": tile_scales(scale, offset)}, (codes - 8) * spread[0] + spread[1]


@given(st.integers(1, 4), st.sampled_from([128, 256, 384]), st.sampled_from([32, 64, 128]))
def test_values_are_those_of_the_formula(tiles: int, columns: int, group: int) -> None:
    shape = tiles * 64, columns
    planes, expected = draw(*shape, group)
    codec = TiledInt4(group)
    assert {name: tuple(plane.shape) for name, plane in planes.items()} == codec.expected(*shape)
    found = decode(codec, planes, shape, torch.float32)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    check_cuts(codec, planes, shape, found)
    transposed = torch.empty(columns, shape[0], dtype=torch.bfloat16)
    codec.decode(planes, 0, transposed.T)
    assert torch.equal(transposed.T, found.to(torch.bfloat16))
    staying = {"weight": planes["weight"], "scale": by_kernel(planes["scale"])}
    assert torch.equal(decode(codec, staying, shape, torch.float32), found)
    check_cuts(codec, staying, shape, found)


@needs_kernel
def test_the_layout_is_that_of_torch() -> None:
    codes = torch.randint(0, 16, (192, 256), dtype=torch.int32)
    assert torch.equal(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), tile_codes(codes).view(192, 128))


@needs_kernel
@given(st.integers(1, 33), st.sampled_from([32, 64, 128]))
def test_the_product_is_that_of_the_values_and_rows_are_independent(rows: int, group: int) -> None:
    planes, values = draw(128, 256, group)
    inputs = torch.randn((rows, 256), generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    found = TiledInt4(group).product(planes, inputs)
    expected = inputs.float() @ values.T
    assert (found.float() - expected).abs().max() <= 0.005 * expected.abs().max()
    staying = {"weight": planes["weight"], "scale": by_kernel(planes["scale"])}
    for row in range(rows):
        assert torch.equal(TiledInt4(group).product(staying, inputs[row : row + 1]), found[row : row + 1])


def _ggml(kind: str, swapped: tuple[int, int] | None = None) -> Callable[[int], tuple[Codec, Planes]]:
    def make(rows: int) -> tuple[Codec, Planes]:
        blocks = draw_blocks(Kind[kind], rows, 256, seed=rows)
        return Ggml(Kind[kind], swapped), {"weight": torch.from_numpy(blocks)}

    return make


def _gptq(rows: int) -> tuple[Codec, Planes]:
    stored, _ = quantised.gptq(torch.randn(rows, 256), 64)
    names = {"weight": "qweight", "scale": "scales", "zero": "qzeros", "g_idx": "g_idx"}
    return Gptq(64, in_order=True), {plane: stored[name] for plane, name in names.items()}


def _awq(rows: int) -> tuple[Codec, Planes]:
    stored, _ = quantised.awq(torch.randn(rows, 256), 64)
    return Awq(64), {
        plane: stored[name] for plane, name in (("weight", "qweight"), ("scale", "scales"), ("zero", "qzeros"))
    }


def _compressed(rows: int) -> tuple[Codec, Planes]:
    stored, _ = quantised.compressed(torch.randn(rows, 256), 32)
    names = {"weight": "weight_packed", "scale": "weight_scale", "zero": "weight_zero_point"}
    return CompressedInt4(32, is_symmetric=False), {plane: stored[name] for plane, name in names.items()}


OTHERS: dict[str, Callable[[int], tuple[Codec, Planes]]] = {
    "Q4_0": _ggml("Q4_0"),
    "Q4_0 by heads": _ggml("Q4_0", swapped=(8, 2)),
    "Q4_1": _ggml("Q4_1"),
    "Q4_K": _ggml("Q4_K"),
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


def _rewritten(codec: Codec, planes: Planes, target: TiledInt4, rows: int) -> dict[str, torch.Tensor]:
    out = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in staying_shapes(target, rows, 256).items()}
    rewrite(codec, planes, out, rows, 256)
    return out


@pytest.mark.parametrize("rows", [64, 80, 208])
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_rewritten(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, but for scales and offsets, which are rounded to bfloat16; in parts or at once."""
    codec, planes = OTHERS[name](rows)
    target = tiled(codec, 256)
    assert target is not None
    found = _rewritten(codec, planes, target, rows)
    expected = decode(codec, planes, (rows, 256), torch.float32)
    values = decode(target, found, (rows, 256), torch.float32)
    groups = expected.unflatten(1, (-1, target.group))
    assert (
        (values - expected).unflatten(1, (-1, target.group)).abs() <= 0.01 * groups.abs().amax(-1, keepdim=True)
    ).all()
    assert sum(plane.nbytes for plane in found.values()) == tiled_bytes(target, rows, 256)
    monkeypatch.setattr("layerstream.checkpoint.codecs.tiled.SLAB_VALUES", 1)
    again = _rewritten(codec, planes, target, rows)
    assert all(torch.equal(again[plane], found[plane]) for plane in found)


@pytest.mark.parametrize("swapped", [None, (16, 2)])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_blocks_of_gguf_are_the_same_in_tiles(kind: str, swapped: tuple[int, int] | None) -> None:
    """Bit for bit, in as many bytes; rewritten for the kernel they are what the blocks themselves would be."""
    codec, shape = Ggml(Kind[kind], swapped), (128, 256)
    blocks = {"weight": torch.from_numpy(draw_blocks(Kind[kind], *shape, seed=3))}
    weight, scale = tile_blocks(codec, blocks, shape[0])
    target, planes = tiled_ggml(codec), {"weight": weight, "scale": scale}
    assert {name: tuple(plane.shape) for name, plane in planes.items()} == target.expected(*shape)
    assert sum(plane.nbytes for plane in planes.values()) == blocks["weight"].nbytes
    found = decode(target, planes, shape, torch.float32)
    assert torch.equal(found, decode(codec, blocks, shape, torch.float32))
    check_cuts(target, planes, shape, found)
    staying = [
        {n: torch.zeros(s, dtype=d) for n, (d, s) in staying_shapes(TiledInt4(32), *shape).items()} for _ in "ab"
    ]
    rewrite(target, planes, staying[0], *shape)
    rewrite(codec, blocks, staying[1], *shape)
    assert all(torch.equal(staying[0][name], plane) for name, plane in staying[1].items())


@needs_kernel
def test_the_product_with_tiles_of_gguf_is_that_of_their_values() -> None:
    codec = Ggml(Kind.Q4_1)
    weight, scale = tile_blocks(codec, {"weight": torch.from_numpy(draw_blocks(Kind.Q4_1, 128, 256, seed=4))}, 128)
    planes = {"weight": weight, "scale": scale}
    inputs = torch.randn((5, 256), generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    found = tiled_ggml(codec).product(planes, inputs)
    expected = inputs.float() @ decode(tiled_ggml(codec), planes, (128, 256), torch.float32).T
    assert (found.float() - expected).abs().max() <= 0.01 * expected.abs().max()
    assert torch.equal(tiled_ggml(codec).product(planes, inputs[2:3]), found[2:3])


def test_what_is_not_linear_in_4_bits_is_not_rewritten() -> None:
    for kind in ("Q6_K", "IQ4_NL", "Q8_0", "MXFP4"):
        assert tiled(Ggml(Kind[kind]), 256) is None
    assert tiled(Ggml(Kind.Q4_0, offset=1.0), 256) is None
    assert tiled(Gptq(64), 256) is None, "its columns may be in any order"
    assert tiled(Gptq(256 * 3, in_order=True), 256 * 3) is None, "a group that the kernel does not have"


def test_matrices_are_rewritten_one_below_the_other() -> None:
    parts = [draw(rows, 256, 64, seed=rows) for rows in (64, 192)]
    target = TiledInt4(64)
    out = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in staying_shapes(target, 256, 256).items()}
    for (planes, _), (start, stop) in zip(parts, ((0, 64), (64, 256)), strict=True):
        rewrite(target, planes, target.cut(out, 256, start, stop), stop - start, 256)
    found = decode(target, out, (256, 256), torch.float32)
    assert torch.allclose(found, torch.cat([values for _, values in parts]), rtol=0, atol=1e-6)


@given(st.floats(-3, 3), st.floats(0, 2), st.integers(0, 5))
def test_a_searched_range_is_no_worse_than_the_whole_one(middle: float, width: float, seed: int) -> None:
    matrix = torch.randn((4, 64), generator=torch.Generator().manual_seed(seed)) * width + middle
    codes, scale, offset = quantise_groups(matrix, 32)
    assert codes.min() >= 0
    assert codes.max() <= 15
    spread = [part.float().repeat_interleave(32, 1) for part in (scale, offset)]
    error = ((codes - 8) * spread[0] + spread[1] - matrix).unflatten(1, (-1, 32)).square().sum(-1)
    extent = matrix.unflatten(1, (-1, 32))
    step = (extent.amax(-1) - extent.amin(-1)) / 15
    rounding = 0.005 * extent.abs().amax(-1)  # of the offset, in bfloat16
    assert (error <= 32 * (0.55 * step + rounding).square() + 1e-12).all()


def test_zeros_stay_zeros() -> None:
    codes, scale, offset = quantise_groups(torch.zeros(2, 64), 64)
    assert ((codes - 8) * scale.float() + offset.float()).abs().max() == 0

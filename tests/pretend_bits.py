"""Stand-ins for kernels that only a real card runs: plain formulas, one operator each, so that they count as one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from layerstream.checkpoint.codecs import bnb_kernel
from layerstream.model import grouped_experts

FUSED_ROWS = 32
"""The most rows that the stand-in for bitsandbytes' product takes."""

_LIBRARY = torch.library.Library("pretended_bits", "DEF")
_LIBRARY.define("dequantize_4bit(Tensor codes, Tensor absmax, int blocksize, str name, Tensor(a!) out) -> ()")
_LIBRARY.define("dequantize_blockwise(Tensor codes, Tensor absmax, Tensor table, int blocksize) -> Tensor")
_LIBRARY.define(
    "gemm_4bit(Tensor inputs, Tensor codes, Tensor absmax, int blocksize, str name, Tensor? nested, Tensor? table,"
    " Tensor? offset) -> Tensor"
)
_LIBRARY.define("grouped_mm(Tensor inputs, Tensor weights, Tensor ends) -> Tensor")


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have them be what a device finds."""
    monkeypatch.setattr(bnb_kernel, "_run", _run)
    monkeypatch.setattr(bnb_kernel, "_run_scales", torch.ops.pretended_bits.dequantize_blockwise)
    monkeypatch.setattr(bnb_kernel, "multiply", _multiply)
    monkeypatch.setattr(bnb_kernel, "tuned_rows", lambda *_: FUSED_ROWS)
    monkeypatch.setattr(grouped_experts, "has_kernel", lambda *_: True)
    monkeypatch.setattr(grouped_experts, "multiply", torch.ops.pretended_bits.grouped_mm)


def _run(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.pretended_bits.dequantize_4bit(codes, scales, blocksize, name, out)


def _multiply(matrix: bnb_kernel.Packed, inputs: torch.Tensor) -> torch.Tensor:
    nested = matrix.nested
    inner = (None, None, None) if nested is None else (nested.codes, nested.table, nested.offset)
    return torch.ops.pretended_bits.gemm_4bit(
        inputs, matrix.codes, matrix.absmax, matrix.blocksize, matrix.name, *inner
    )


@cache
def table_of(name: str) -> torch.Tensor:
    """The 16 values of ``"nf4"`` or ``"fp4"``, as bitsandbytes has them."""
    return bnb_kernel.import_bitsandbytes().functional.get_4bit_type(name, device="cpu")


@torch.library.impl(_LIBRARY, "dequantize_4bit", "CompositeExplicitAutograd")
def _dequantize(codes: torch.Tensor, absmax: torch.Tensor, blocksize: int, name: str, out: torch.Tensor) -> None:
    flat = codes.reshape(-1).to(torch.int32)
    values = table_of(name)[torch.stack([flat >> 4, flat & 15], dim=-1)].view(-1, blocksize)
    out.copy_((values * absmax[:, None]).view(out.shape))


@torch.library.impl(_LIBRARY, "dequantize_blockwise", "CompositeExplicitAutograd")
def _dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int
) -> torch.Tensor:
    return table[codes.to(torch.int32)] * absmax[torch.arange(len(codes)) // blocksize]


@torch.library.impl(_LIBRARY, "gemm_4bit", "CompositeExplicitAutograd")
def _gemm(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    name: str,
    nested: torch.Tensor | None,
    table: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    if nested is not None and table is not None and offset is not None:
        absmax = _dequantize_blockwise(nested, absmax, table, bnb_kernel.NESTED_BLOCK) + offset
    values = inputs.new_empty((2 * codes.numel() // inputs.shape[1], inputs.shape[1]))
    _dequantize(codes, absmax, blocksize, name, values)
    return torch.nn.functional.linear(inputs, values)


@torch.library.impl(_LIBRARY, "grouped_mm", "CompositeExplicitAutograd")
def _grouped(inputs: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Row by row, so that nothing depends on how many there are; what is nobody's is no number."""
    found = inputs.new_full((len(inputs), weights.shape[2]), float("nan"))
    begin = 0
    for group, end in enumerate(ends.tolist()):
        for row in range(begin, end):
            found[row] = inputs[row] @ weights[group]
        begin = end
    return found

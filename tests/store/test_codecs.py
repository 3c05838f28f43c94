"""Encodings of a page-layer."""

from __future__ import annotations

import pytest
import torch
from layerstream.kv.shape import PageShape
from layerstream.store.codecs import CODECS

TOKENS = 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "tolerance"), [("none", 0.0), ("int8", 0.02), ("fp8", 0.07)])
def test_what_comes_back(name: str, tolerance: float, dtype: str) -> None:
    codec, shape = CODECS[name], PageShape(2, 16, 3, 8, dtype)
    torch.manual_seed(0)
    keys = torch.randn(TOKENS, 2, 16) * torch.logspace(-1, 1, 16)  # channels of unequal size, as keys have
    values = torch.randn(TOKENS, 3, 8)
    keys, values = keys.to(getattr(torch, dtype)), values.to(getattr(torch, dtype))
    data = b"".join(bytes(buffer) for buffer in codec.encode(keys, values))
    assert len(data) == codec.num_bytes(shape, TOKENS)
    got_keys, got_values = torch.full_like(keys, 9), torch.full_like(values, 9)
    codec.decode(memoryview(data), got_keys, got_values)
    for got, exact in ((got_keys, keys), (got_values, values)):
        difference = (got.float() - exact.float()).abs()
        assert float((difference / exact.float().abs().amax(dim=0).clamp_min(1e-3)).max()) <= tolerance + 1e-9
    if name == "none":
        assert torch.equal(got_keys, keys)
        assert torch.equal(got_values, values)


def test_compression_takes_half_of_bf16() -> None:
    shape = PageShape(8, 128, 8, 128, "bfloat16")
    exact = CODECS["none"].num_bytes(shape, 128)
    assert CODECS["int8"].num_bytes(shape, 128) < 0.52 * exact
    assert CODECS["fp8"].num_bytes(shape, 128) < 0.51 * exact


def test_zeros_stay_zeros() -> None:
    for codec in CODECS.values():
        zeros = torch.zeros(TOKENS, 2, 16)
        data = b"".join(bytes(buffer) for buffer in codec.encode(zeros, zeros))
        got = torch.ones_like(zeros), torch.ones_like(zeros)
        codec.decode(memoryview(data), *got)
        assert not got[0].any()
        assert not got[1].any()

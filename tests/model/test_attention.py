"""Attention by matrix products against SDPA; whole models are compared in tests/reference."""

from __future__ import annotations

import pytest
import torch
from layerstream.model import attention
from torch.nn import functional as F

KV_HEADS, GROUP, WIDTH = 2, 3, 16


def draw(num_rows: int, num_columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(num_rows + num_columns)
    query = torch.randn(KV_HEADS, GROUP * num_rows, WIDTH).to(dtype)
    # strided, as pages hand them out
    keys, values = (torch.randn(num_columns, KV_HEADS, WIDTH).to(dtype).transpose(0, 1) for _ in range(2))
    return query, keys, values


def causal(num_rows: int, num_columns: int, window: int | None = None) -> torch.Tensor:
    rows = torch.arange(num_columns - num_rows, num_columns)[:, None]
    columns = torch.arange(num_columns)[None]
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    return mask.repeat(GROUP, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("scores_at_once", [2**20, 64])
@pytest.mark.parametrize(("num_rows", "num_columns", "window"), [(40, 40, None), (32, 200, None), (33, 100, 20)])
def test_products_are_sdpa(
    num_rows: int,
    num_columns: int,
    window: int | None,
    scores_at_once: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
    query, keys, values = draw(num_rows, num_columns, dtype)
    mask = causal(num_rows, num_columns, window)
    first_masked = num_columns - num_rows if window is None else 0
    found = attention._attend_by_head(query, keys, values, mask, first_masked, 0.25, None, None)
    expected = F.scaled_dot_product_attention(query.float(), keys.float(), values.float(), mask, scale=0.25)
    assert torch.allclose(found.float(), expected, atol=tolerance)


def test_sinks_and_soft_caps() -> None:
    query, keys, values = draw(5, 9, torch.float32)
    mask, sinks = causal(5, 9), torch.randn(KV_HEADS * GROUP)
    found = attention._attend_by_head(query, keys, values, mask, 4, 0.25, 2.0, sinks)
    scores = torch.tanh(query @ keys.transpose(1, 2) * 0.25 / 2.0) * 2.0
    scores = scores.masked_fill(~mask, float("-inf"))
    column = sinks.view(KV_HEADS, GROUP, 1, 1).expand(-1, -1, 5, 1).reshape(KV_HEADS, GROUP * 5, 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    assert torch.allclose(found, weights @ values, atol=1e-5)


def test_how_rows_are_cut_changes_no_bit_of_others() -> None:
    """Rows depend on the shape of their own span alone: the same call, the same bits."""
    query, keys, values = draw(64, 300, torch.bfloat16)
    arguments = (query, keys, values, causal(64, 300), 236, 0.25, None, None)
    assert torch.equal(attention._attend_by_head(*arguments), attention._attend_by_head(*arguments))

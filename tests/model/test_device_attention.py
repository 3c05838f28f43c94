"""Attention for accelerators against the formula, every row on its own."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from layerstream.core.sight import Sight
from layerstream.errors import MissingExtra
from layerstream.model import device_attention
from layerstream.model.device_attention import Formula, Seen, attend_on_device, resolve_attention

HEADS, KV_HEADS, WIDTH = 6, 2, 16


def plain(query, keys, values, sees: Seen, scale, softcap=None, sinks=None) -> torch.Tensor:
    """Row by row in fp64."""
    rows = []
    for row in range(query.shape[1]):
        position = sees.start + row
        seen = [
            column
            for column in range(sees.first, sees.stop)
            if column <= position
            and (sees.window is None or column > position - sees.window)
            and (sees.chunk is None or column // sees.chunk == position // sees.chunk)
        ]
        places = torch.tensor(seen) - sees.first
        heads = []
        for head in range(query.shape[0]):
            group = head * keys.shape[0] // query.shape[0]
            scores = keys[group, places].double() @ query[head, row].double() * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            weights = torch.softmax(scores, 0)[: len(seen)]
            heads.append(weights @ values[group, places].double())
        rows.append(torch.stack(heads))
    return torch.stack(rows).float()


def formula(
    scale: float, softcap: float | None = None, sinks: torch.Tensor | None = None, *, prefers_flash: bool = False
) -> Formula:
    return Formula(scale, softcap, sinks, Sight(), prefers_flash)


def draw(num_rows: int, length: int, width: int = WIDTH, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn((HEADS, num_rows, width), generator=random)
    keys = torch.randn((KV_HEADS, length, width), generator=random)
    return query, keys, torch.randn((KV_HEADS, length, WIDTH), generator=random)


SIGHTS = {
    "a token": Seen(40, 41, 0, None, None),
    "a token in a window": Seen(40, 41, 31, 10, None),
    "the first chunk": Seen(0, 24, 0, None, None),
    "a later chunk": Seen(20, 41, 0, None, None),
    "a chunk in a window": Seen(20, 41, 11, 10, None),
    "a chunk across a border": Seen(20, 41, 16, None, 32),
}


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("extra", ["nothing", "softcap", "sinks"])
def test_equals_the_formula(sight: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_attention, "SCORES_AT_ONCE", 700)  # so that products go in several steps
    sees = SIGHTS[sight]
    query, keys, values = draw(sees.stop - sees.start, sees.stop - sees.first)
    softcap = 2.0 if extra == "softcap" else None
    sinks = torch.randn(HEADS) if extra == "sinks" else None
    found = attend_on_device(query, keys, values, sees, formula(0.3, softcap, sinks))
    assert torch.allclose(found, plain(query, keys, values, sees, 0.3, softcap, sinks), atol=1e-5)


def test_shapes_that_no_fused_kernel_takes_go_through_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(device_attention, "_NOT_FUSED", set())
    monkeypatch.setattr(device_attention.F, "scaled_dot_product_attention", refuse)
    sees = SIGHTS["a later chunk"]
    query, keys, values = draw(21, 41, width=24)
    found = attend_on_device(query, keys, values, sees, formula(0.3))
    assert torch.allclose(found, plain(query, keys, values, sees, 0.3), atol=1e-5)
    assert {(torch.float32, 24, WIDTH)} == device_attention._NOT_FUSED


@pytest.mark.parametrize("sight", ["a token", "a later chunk", "a chunk in a window"])
def test_flash_attn_is_called_as_its_documentation_says(sight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout ``(batch, rows, heads, width)``; causal masks and windows are aligned with the last position of both."""
    called = []

    def flash(q, k, v, *, softmax_scale, causal, window_size, softcap):
        called.append(window_size)
        assert causal
        start = k.shape[1] - q.shape[1]
        window = None if window_size == (-1, -1) else window_size[0] + 1
        sees = Seen(start, k.shape[1], 0, window, None)
        parts = (part[0].transpose(0, 1).float() for part in (q, k, v))
        return plain(*parts, sees, softmax_scale, softcap or None)[None].to(q.dtype)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash))
    device_attention._flash_attn.cache_clear()
    sees = SIGHTS[sight]
    query, keys, values = (part.bfloat16() for part in draw(sees.stop - sees.start, sees.stop - sees.first))
    found = attend_on_device(query, keys, values, sees, formula(0.3, 2.0, prefers_flash=True))
    expected = plain(query, keys, values, sees, 0.3, 2.0)
    assert called
    assert torch.allclose(found.float(), expected, atol=2e-2)
    device_attention._flash_attn.cache_clear()


def test_what_flash_attn_has_no_argument_for_is_not_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_attention, "_flash", lambda *_: pytest.fail("it has no sinks, and no chunks"))
    sees = SIGHTS["a chunk across a border"]
    query, keys, values = (part.bfloat16() for part in draw(21, 25))
    attend_on_device(query, keys, values, sees, formula(0.3, prefers_flash=True))
    sees = SIGHTS["a later chunk"]
    query, keys, values = (part.bfloat16() for part in draw(21, 41))
    attend_on_device(query, keys, values, sees, formula(0.3, None, torch.randn(HEADS), prefers_flash=True))


def test_flash_attn_has_to_be_there_where_it_was_asked_for() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    with pytest.raises(MissingExtra, match=r"layerstream\[flash\]"):
        resolve_attention("flash_attn", cuda)
    assert not resolve_attention("auto", cuda)
    assert not resolve_attention("sdpa", cpu)

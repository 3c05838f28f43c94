"""Attention of many queries in one call: padded blocks against the formula, and which kernels are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layerstream.core.sight import Sight
from layerstream.core.sweep import RowBlock
from layerstream.hardware import accelerators
from layerstream.kv.device_rows import Query, Reading
from layerstream.kv.readings import ReadingTensors
from layerstream.model import padded_attention, ragged_kernels
from layerstream.model.padded_attention import attend_padded
from layerstream.model.ragged_kernels import KERNELS, choose, formula

from tests import pretend_kernels

HEADS, KV_HEADS, WIDTH, POOL = 6, 2, 16, 1400


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(places: list[tuple[int, int]]) -> ReadingTensors:
    """Single rows with keys at ``(begin, length)``."""
    reading = Reading(tuple(Query(row, 1, *place) for row, place in enumerate(places)), True, True)
    begins = torch.tensor([*(begin for begin, _ in places), sum(places[-1])], dtype=torch.int32)
    lengths = torch.tensor([length for _, length in places], dtype=torch.int32)
    ends = torch.arange(len(places) + 1, dtype=torch.int32)
    return ReadingTensors(reading, None, ends, begins, lengths, None, 1)


PLACES = [(3 * n, 1 + (37 * n) % 130) for n in range(21)]


@pytest.mark.parametrize("extra", ["nothing", "softcap", "sinks"])
def test_padded_blocks_equal_the_formula(extra: str) -> None:
    queries, keys, values = (
        draw(len(PLACES), HEADS, WIDTH),
        draw(POOL, KV_HEADS, WIDTH, seed=1),
        draw(POOL, KV_HEADS, 8),
    )
    softcap, sinks = 2.0 if extra == "softcap" else None, draw(HEADS) if extra == "sinks" else None
    found = attend_padded(queries, keys, values, call_of(PLACES), 0.3, softcap, sinks)
    for row, (begin, length) in enumerate(PLACES):
        seen = slice(begin, begin + length)
        wide, deep = (part[seen].double().repeat_interleave(3, dim=1) for part in (keys, values))
        scores = torch.einsum("hw,nhw->hn", queries[row].double(), wide) * 0.3
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        column = scores.new_full((HEADS, 1), float("-inf")) if sinks is None else sinks.double()[:, None]
        weights = torch.softmax(torch.cat([scores, column], dim=1), dim=1)[:, :-1]
        torch.testing.assert_close(found[row].double(), torch.einsum("hn,nhw->hw", weights, deep), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_change_no_bit_of_a_padded_row(dtype: torch.dtype) -> None:
    queries, keys, values = (
        draw(*shape).to(dtype)
        for shape in ((len(PLACES), HEADS, WIDTH), (POOL, KV_HEADS, WIDTH), (POOL, KV_HEADS, WIDTH))
    )
    together = attend_padded(queries, keys, values, call_of(PLACES), 0.3, 2.0, None)
    for row, place in enumerate(PLACES):
        alone = attend_padded(queries[row : row + 1], keys, values, call_of([place]), 0.3, 2.0, None)
        assert torch.equal(alone[0], together[row])


def test_operators_of_padded_blocks_do_not_depend_on_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(padded_attention, "_group", lambda queries, *_: calls.append(len(queries)) or queries)
    keys = draw(POOL, KV_HEADS, WIDTH)
    for num_rows in (1, 7, padded_attention.GROUP):
        attend_padded(draw(num_rows, HEADS, WIDTH), keys, keys, call_of(PLACES[:num_rows]), 0.3, 2.0, None)
    assert calls == [padded_attention.GROUP] * 3


@pytest.fixture
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins run there."""
    monkeypatch.setattr(ragged_kernels, "_agrees", {})
    monkeypatch.setattr(ragged_kernels, "can_run", lambda name, device: True)
    for name in KERNELS:
        monkeypatch.setitem(KERNELS, name, getattr(pretend_kernels, name))


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw(2, HEADS, WIDTH).to(dtype), draw(9, KV_HEADS, WIDTH).to(dtype), draw(9, KV_HEADS, WIDTH).to(dtype)


@pytest.mark.usefixtures("on_the_processor")
def test_the_kernel_for_a_dtype() -> None:
    assert choose(*tensors(torch.bfloat16), needs_sums=True) is pretend_kernels.flash
    assert choose(*tensors(torch.float32), needs_sums=False) is pretend_kernels.efficient
    assert choose(*tensors(torch.float32), needs_sums=True) is None


@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("fault", ["wrong", "sums", "far", "neighbours", "absent"])
def test_a_kernel_that_is_not_what_it_should_be_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(queries, keys, values, ragged, scale):
        if fault == "absent":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        found, sums = pretend_kernels.flash(queries, keys, values, ragged, scale)
        if fault == "wrong" and ragged.window is not None:
            found = found * 1.1
        if fault == "far" and ragged.window is not None:  # a window that is only looked at among the first keys
            whole, _ = pretend_kernels.flash(queries, keys, values, replace(ragged, window=None), scale)
            found = torch.where(ragged.lengths.max() > 128, whole, found)
        if fault == "sums":
            sums = sums / 0.7
        return found + (1e-3 * (len(ragged.lengths) - 1) if fault == "neighbours" else 0.0), sums

    monkeypatch.setitem(KERNELS, "flash", kernel)
    assert choose(*tensors(torch.bfloat16), needs_sums=True) is None


@pytest.mark.usefixtures("on_the_processor")
def test_a_kernel_that_had_no_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_):
        raise torch.OutOfMemoryError("pretended")

    with monkeypatch.context() as full:
        full.setitem(KERNELS, "flash", kernel)
        with pytest.raises(torch.OutOfMemoryError):
            choose(*tensors(torch.bfloat16), needs_sums=True)
    assert choose(*tensors(torch.bfloat16), needs_sums=True) is pretend_kernels.flash


def test_no_kernel_on_a_device_that_has_none() -> None:
    assert not accelerators.can_run("flash", torch.device("cpu"))
    assert choose(*tensors(torch.bfloat16), needs_sums=False) is None


def test_the_formula_hides_what_comes_later_and_what_left_the_window() -> None:
    queries, keys = draw(3, HEADS, WIDTH), draw(10, KV_HEADS, WIDTH, seed=1)
    whole = formula(queries, keys, keys, 0.3, 4, True)
    for row in range(3):
        seen = keys[8 + row - 4 : 8 + row]
        alone = formula(queries[row : row + 1], seen, seen, 0.3, None, False)
        torch.testing.assert_close(whole[row : row + 1], alone)


def test_a_block_s_padding_counts() -> None:
    assert RowBlock((), 4).num_padding == 4
    assert Sight(chunk=8).parts(3, 20) == [(3, 8), (8, 16), (16, 20)]

"""Load or recompute: the arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.store.choice import Rates, break_even_tokens, load_seconds, recompute_seconds

RATES = Rates(read_bytes_per_second=3e9, weight_seconds=1.5, max_sweep_tokens=512)
COMPUTE = 8e-3  # seconds a token
KV = 112 * 1024  # bytes a token


def test_below_the_break_even_length_recomputing_is_free() -> None:
    """A sweep is needed anyway, and its disk is the slower side."""
    border = break_even_tokens(COMPUTE, KV, RATES)
    assert border == pytest.approx(1.5 / (COMPUTE - KV / 3e9))
    assert recompute_seconds(128, 128 * COMPUTE, RATES) == 0
    assert recompute_seconds(4096, 4096 * COMPUTE, RATES) > 10 * load_seconds(4096 * KV, RATES)


def test_many_sweeps_cost_their_weights() -> None:
    assert recompute_seconds(1024, 0.0, RATES) == 1.5


def test_a_resident_model_pays_its_compute() -> None:
    resident = Rates(3e9, 0.0, 512)
    assert recompute_seconds(100, 0.8, resident) == 0.8
    assert break_even_tokens(COMPUTE, KV, resident) == 0


@given(st.floats(1e-5, 1.0), st.integers(1, 10**7), st.floats(1e6, 1e11), st.floats(0, 100), st.integers(1, 4096))
def test_the_border_separates(compute: float, kv: int, rate: float, weights: float, most: int) -> None:
    rates = Rates(rate, weights, most)
    border = break_even_tokens(compute, kv, rates)
    below, above = int(border * 0.99), int(border * 1.01) + 1
    if below >= 1:
        assert recompute_seconds(below, below * compute, rates) <= load_seconds(below * kv, rates) * (1 + 1e-6) + 1e-9
    if above <= most and border < most:
        assert recompute_seconds(above, above * compute, rates) >= load_seconds(above * kv, rates) * (1 - 1e-6) - 1e-9

"""Cutting units and choosing residents, with exact expectations."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.planner import units
from layerstream.planner.units import PlannedUnit, WeightNode, choose_residents, cut_units, slice_rows

MIB = 2**20

LAYER = WeightNode(
    "layer",
    children=(
        WeightNode("layer.attn", own_bytes=64, compute_bytes=64, children=(
            WeightNode("layer.attn.q", 400_000, 400_000, 100), WeightNode("layer.attn.o", 400_000, 400_000, 100))),
        WeightNode("layer.mlp", children=(WeightNode("layer.mlp.up", 1_600_000, 1_600_000, 400),)),
        WeightNode("layer.norm", 256, 256),
    ),
)  # fmt: skip


def test_a_layer_that_fits_is_one_unit() -> None:
    assert cut_units(LAYER, LAYER.total_bytes) == [PlannedUnit("layer", 2_400_320, 2_400_320)]


def test_a_layer_that_does_not_fit_is_cut_at_its_modules() -> None:
    units = cut_units(LAYER, 1_700_000)
    assert [(unit.module, unit.num_bytes, unit.pinned) for unit in units] == [
        ("layer.attn", 800_064, False),
        ("layer.mlp", 1_600_000, False),
        ("layer.norm", 256, True),
    ]


def test_cutting_a_module_pins_what_it_owns_itself() -> None:
    units = cut_units(LAYER, 500_000)
    assert units[0] == PlannedUnit("layer.attn", 64, 64, own_only=True, pinned=True)
    assert [unit.name for unit in units[1:3]] == ["layer.attn.q", "layer.attn.o"]
    assert [unit.rows for unit in units if unit.module == "layer.mlp.up"] == [
        (0, 112),
        (112, 224),
        (224, 336),
        (336, 400),
    ]


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 100_000))
def test_slices_cover_all_rows_within_the_limit(num_rows: int, row_bytes: int, limit: int) -> None:
    node = WeightNode("linear", num_rows * row_bytes, num_rows * row_bytes, num_rows)
    slices = list(slice_rows(node, limit))
    assert slices[0].rows is not None
    assert slices[0].rows[0] == 0
    for before, after in pairwise(slices):
        assert before.rows is not None
        assert after.rows is not None
        assert before.rows[1] == after.rows[0]
    assert slices[-1].rows is not None
    assert slices[-1].rows[1] == num_rows
    for unit in slices:
        assert unit.num_bytes <= max(limit, row_bytes)
    assert sum(unit.num_bytes for unit in slices) == node.own_bytes


@pytest.mark.parametrize(
    ("available", "expected"),
    [(0, []), (10, [0]), (20, [0, 4]), (30, [0, 2, 4]), (79, [0, 1, 2, 3, 4, 5, 6]), (80, list(range(8)))],
)
def test_residents_are_spread_evenly(available: int, expected: list[int]) -> None:
    assert sorted(choose_residents([10] * 8, available)) == expected


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(0, 20_000))
def test_residents_fit_and_leave_no_room_for_another(sizes: list[int], available: int) -> None:
    chosen = choose_residents(sizes, available)
    used = sum(sizes[index] for index in chosen)
    assert used <= available
    assert all(sizes[index] > available - used for index in range(len(sizes)) if index not in chosen)


def test_units_are_counted_with_their_page_ends() -> None:
    unit = PlannedUnit("x", 10_000, 10_000)
    assert unit.ring_bytes % units.PAGE == 0
    assert unit.ring_bytes >= 10_000 + units.UNIT_OVERHEAD


def test_a_matrix_that_is_never_split_is_one_unit() -> None:
    (unit,) = slice_rows(WeightNode("head", 10 * MIB, 10 * MIB, num_rows=100, row_step=0, decode_bytes=7), MIB)
    assert unit.rows is None
    assert (unit.num_bytes, unit.decode_bytes) == (10 * MIB, 7)

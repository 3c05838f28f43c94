"""Which module is named, and what a difference is called."""

from __future__ import annotations

import math

import pytest
import torch
from layerstream.comparing.differences import difference, drift, rerouted
from layerstream.comparing.judging import (
    TOLERANCES,
    Call,
    Choice,
    Culprit,
    Finding,
    find_culprit,
    first_difference,
    judge,
    suspects,
)

EXACT = TOLERANCES["float32"]


def finding(module: str, excess: float) -> Finding:
    return Finding(module, excess, 0.0, 0, 0.0)


def test_the_innermost_module_that_returned_first_is_named() -> None:
    calls = [
        Call("attn.q", input_agrees=True, output_agrees=True),
        Call("attn.k", input_agrees=True, output_agrees=False),
        Call("attn.o", input_agrees=False, output_agrees=False),
        Call("attn", input_agrees=True, output_agrees=False),
    ]
    assert find_culprit(calls) == Culprit("attn.k")


def test_what_a_module_computes_between_its_own_is_named_by_these() -> None:
    calls = [
        Call("norm", input_agrees=True, output_agrees=True),
        Call("attn.v", input_agrees=True, output_agrees=True),
        Call("attn.o", input_agrees=False, output_agrees=False),
        Call("attn", input_agrees=True, output_agrees=False),
        Call("mlp", input_agrees=False, output_agrees=False),
    ]
    assert find_culprit(calls) == Culprit("attn", between=("attn.v", "attn.o"))


def test_what_cannot_be_told_blames_nobody() -> None:
    unknown = Call("attn.kv_b", input_agrees=None, output_agrees=None)
    assert find_culprit([unknown, Call("attn", input_agrees=True, output_agrees=None)]) is None
    assert find_culprit([unknown, Call("attn", input_agrees=True, output_agrees=False)]) == Culprit("attn")
    assert find_culprit([Call("layer", input_agrees=True, output_agrees=True)]) is None


def test_experts_that_all_wrong_rows_have_and_no_other() -> None:
    assert suspects([(0, 1), (1, 2), (0, 2)], [True, True, False]) == (1,)
    assert suspects([(0, 1), (2, 3)], [True, True]) == ()
    assert suspects([(0, 1), (2, 3)], [False, False]) == ()


def test_outcomes() -> None:
    right, wrong = finding("a", 0.9), finding("b", 1.1)
    same = Choice(9, 5, 5, 0.0, 0.0)
    tied, other = Choice(9, 5, 6, 0.001, EXACT.tie / 2), Choice(10, 5, 6, 1.0, 0.1)
    assert judge([right, right], [same], EXACT) == "same"
    assert judge([right], [same, tied], EXACT) == "tie"
    assert judge([right], [tied, other], EXACT) == "rounding"
    assert judge([right, wrong], [same], EXACT) == "different"
    assert first_difference([right, wrong, finding("c", 5.0)]) == wrong
    assert not finding("a", math.inf).agrees
    assert not finding("a", math.nan).agrees


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_rounding_agrees_and_half_as_much_again_does_not(dtype: str) -> None:
    tolerance = TOLERANCES[dtype]
    exact = torch.randn(7, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = exact.to(getattr(torch, dtype))
    assert difference(rounded, exact, tolerance).agrees
    wrong = rounded.clone()
    wrong[4] *= 1.5
    found = difference(wrong, exact, tolerance)
    assert not found.agrees
    assert found.worst_row == 4
    assert drift(wrong, exact) == pytest.approx(0.5, rel=0.01)


def test_what_a_layer_adds_is_looked_at_beside_what_it_adds_to() -> None:
    entering = torch.full((1, 64), 100.0)
    added = torch.linspace(-1, 1, 64)[None]
    found, expected = entering + 1.1 * added, entering + added
    assert not difference(found, expected, EXACT, entering).agrees
    assert difference(found, expected, TOLERANCES["bfloat16"], entering).agrees, "bfloat16 has no room for it there"


def test_no_number_differs() -> None:
    found, expected = torch.ones(2, 4), torch.ones(2, 4)
    found[1, 2] = torch.nan
    assert difference(found, expected, EXACT).excess.tolist() == [0.0, math.inf]
    assert difference(torch.zeros(1, 4), torch.zeros(1, 4), EXACT).agrees


def test_experts_as_good_as_equal_are_a_tie() -> None:
    index, weights = torch.tensor([[0, 1]] * 5), torch.tensor([[0.6, 0.4]] * 5)
    found = [
        ([1, 0], [0.4, 0.6], "the same in another order"),
        ([0, 2], [0.6, 0.4], "tie"),
        ([2, 0], [0.3, 0.7], "the one that both have weighs more"),
        ([2, 1], [0.6, 0.4], "the best is another"),
        ([2, 3], [0.6, 0.4], "both are others, with the same weights"),
    ]
    routes = torch.tensor([row for row, _, _ in found]), torch.tensor([row for _, row, _ in found])
    ties, wrong = rerouted(routes, (index, weights), EXACT)
    assert ties.tolist() == [False, True, False, False, False]
    assert wrong.tolist() == [False, False, True, True, True]

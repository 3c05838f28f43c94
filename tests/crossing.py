"""Which combinations the fast tests run of all there are; ``make families`` runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

ALONE = frozenset({"deepseek-v3", "cut"})
"""Its attention must fit the ring as a whole, as only one sequence is in a row block."""


def crossed(*axes: Sequence[Any], without: Collection[frozenset[Any]] = ()) -> list[Any]:
    """All combinations of *axes* as parameters of a test; those that bring no two values together that have not met
    before are left to ``make families``.

    Args:
        without: values that do not go together.
    """
    met: set[tuple[int, Any, int, Any]] = set()
    chosen: set[tuple[Any, ...]] = set()
    possible = [values for values in product(*axes) if not any(pair.issubset(values) for pair in without)]

    def new(values: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
        return {(i, values[i], j, values[j]) for i, j in combinations(range(len(values)), 2)} - met

    while found := new(best := max(possible, key=lambda values: len(new(values)))):
        met |= found
        chosen.add(best)
    return [pytest.param(*values, marks=() if values in chosen else pytest.mark.families) for values in possible]


def by_turns(kinds: Iterable[Any], *groups: Sequence[Any]) -> list[Any]:
    """Each of *kinds* with every mode of all *groups*, as parameters of a test: with one of each group, by turns, and
    with the others in ``make families``."""
    return [
        pytest.param(kind, mode, marks=() if turn % len(group) == place else pytest.mark.families)
        for turn, kind in enumerate(kinds)
        for group in groups
        for place, mode in enumerate(group)
    ]

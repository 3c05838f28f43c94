"""Within the first layer that differs: the first module whose input agrees and whose output does not.

The engine has answered once more for it, with what its modules were given and gave on record: its bits are the same
again, and so is what is wrong with them. If nothing is wrong this time, what it reads or computes is not the same each
time, and no module is to blame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from layerstream.comparing.differences import difference
from layerstream.comparing.judging import AGREES, Call, Culprit, Finding, Tolerance, find_culprit, suspects
from layerstream.comparing.recording import Record
from layerstream.comparing.stations import Stations


def find_culprit_inside(
    layer: Finding,
    stations: Stations,
    returned: Sequence[str],
    found: Record,
    expected: Record,
    tolerance: Tolerance,
) -> Culprit | None:
    """The module to blame for *layer*.

    Args:
        returned: the modules within it and itself, in the order in which they returned.
        found, expected: what the engine's were given and gave, and plain transformers'.
    """

    def agrees(name: str) -> bool | None:
        ours, theirs = found.get(name), expected.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return None
        return difference(ours, theirs, tolerance).agrees

    inner = [Call(path, agrees(f"{path}:in"), agrees(f"{path}:out")) for path in returned if path != layer.module]
    culprit = find_culprit([*inner, Call(layer.module, True, agrees(f"{layer.module}:out"))])
    mixture = stations.mixture_in(layer.module)
    if culprit is None and mixture is not None and layer.num_misrouted:
        return Culprit(mixture.path)  # it was given the experts that the engine chose, and these are the fault
    if culprit is None or mixture is None or culprit.path != mixture.experts:
        return culprit
    return dataclasses.replace(culprit, experts=_suspects(mixture.experts, found, expected, tolerance))


def _suspects(experts: str, found: Record, expected: Record, tolerance: Tolerance) -> tuple[int, ...]:
    """Which of the *experts* are wrong, if their rows tell."""
    routes = found.get(f"{experts}:experts")
    ours, theirs = found.get(f"{experts}:out"), expected.get(f"{experts}:out")
    if routes is None or ours is None or theirs is None:
        return ()
    return suspects(routes.tolist(), (difference(ours, theirs, tolerance).excess > AGREES).tolist())

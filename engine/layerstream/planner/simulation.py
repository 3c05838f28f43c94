"""One sweep as a plan foresees it: what is read, copied and computed when. Pure.

Units are read in order, as far ahead as the ring has room, cross the link one after the other, and are computed in
order; a unit is there for the compute when it was read (and copied), and its room is free again when it was computed.
Several devices have a ring and a link each; the disk is all of theirs.
The sweep that is shown is one of many: its first units were brought in while the sweep before it ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.planner.forecast import Forecast
from layerstream.planner.units import PlannedUnit


@dataclass(frozen=True, slots=True)
class Step:
    """*kind* is ``"read"``, ``"copy"`` or ``"compute"``; seconds since the sweep began."""

    kind: str
    unit: str
    start: float
    stop: float


def simulate(forecast: Forecast, num_sweeps: int = 2) -> list[Step]:
    """The last of *num_sweeps* sweeps of one token, with what is read for the next one beside it."""
    plan, rates = forecast.plan, forecast.rates
    units = plan.weights.units
    lanes = [_Lane(part.weights.ring_bytes) for part in plan.by_device]
    owners = zip(plan.by_device, lanes, strict=True)
    lane_of = {unit.name: lane for part, lane in owners for unit in part.weights.units}
    read_free = compute_free = began = 0.0
    order = [(sweep, index) for sweep in range(num_sweeps + 1) for index in range(len(units))]
    steps: list[Step] = []
    arrived: dict[tuple[int, int], float] = {}
    for key in order:
        if key[1] not in plan.weights.residents:
            lane_of[units[key[1]].name].bringing.append(key)
    for sweep, index in order:
        if sweep == num_sweeps:
            break
        if index == 0:
            began, steps = compute_free, [step for step in steps if step.stop > compute_free]
        unit = units[index]
        while (lane := _next_lane(lanes, units)) is not None:
            key = lane.bringing.popleft()
            other = units[key[1]]
            start = there = lane.free_since
            if key[1] not in plan.weights.host_residents:
                start = max(read_free, start)
                there = read_free = start + other.num_bytes / rates.disk
                steps.append(Step("read", other.name, start, there))
            if rates.link:
                start = max(there, lane.link_free)
                there = lane.link_free = start + other.num_bytes / rates.link
                steps.append(Step("copy", other.name, start, there))
            arrived[key] = there
            lane.take(other)
        start = max(compute_free, arrived.get((sweep, index), 0.0))
        compute_free = start + forecast.unit_seconds(unit)
        steps.append(Step("compute", unit.name, start, compute_free))
        if unit.experts:  # which ones they are is known now
            start = max(read_free, compute_free)
            there = read_free = start + forecast.block_read_seconds
            steps.append(Step("read", unit.experts, start, there))
            compute_free = max(there, compute_free + forecast.block_seconds)
            steps.append(Step("compute", unit.experts, compute_free - forecast.block_seconds, compute_free))
        if index not in plan.weights.residents:
            lane_of[unit.name].give_back(unit, compute_free)
    return [Step(step.kind, step.unit, step.start - began, step.stop - began) for step in steps if step.stop > began]


def _next_lane(lanes: Sequence[_Lane], units: Sequence[PlannedUnit]) -> _Lane | None:
    """Of those whose ring has room for what comes next, the one that needs it first."""
    ready = [lane for lane in lanes if lane.bringing and lane.has_room(units[lane.bringing[0][1]])]
    return min(ready, key=lambda lane: lane.bringing[0], default=None)


class _Lane:
    """A ring and a link: how much of the ring is taken, and since when it has had the room that it has; the units that
    are to come, as sweep and place."""

    def __init__(self, capacity: int) -> None:
        self._left = capacity
        self.free_since = 0.0
        self.link_free = 0.0
        self.bringing: deque[tuple[int, int]] = deque()

    def has_room(self, unit: PlannedUnit) -> bool:
        return unit.ring_bytes <= self._left

    def take(self, unit: PlannedUnit) -> None:
        self._left -= unit.ring_bytes

    def give_back(self, unit: PlannedUnit, when: float) -> None:
        self._left += unit.ring_bytes
        self.free_since = when

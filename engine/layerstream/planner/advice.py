"""The one change that would help most: other plans for the same model on the same machine, compared. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from layerstream.errors import BudgetTooSmall
from layerstream.planner.facts import ModelFacts
from layerstream.planner.forecast import Forecast
from layerstream.planner.on_device import comfortable_host_bytes, make_device_plan
from layerstream.planner.plan import Plan
from layerstream.planner.spending import comfortable_bytes, make_plan
from layerstream.sizes import format_size
from layerstream.streaming.residency import WeightNode

BITS = {"nf4": 4.13, "int4": 4.25, "int8": 8.02}  # per weight, scales included, as `pack` writes them
KERNELS = {"int4": "int4", "int8": "int8"}
ROW_STEP = 64
WORTH = 1.15  # times faster; less is not worth a word
GIB = 2**30
SPARE_MEMORY = (4 * GIB, 16 * GIB, 64 * GIB)


@dataclass(frozen=True, slots=True)
class Advice:
    """A change, and how many times faster an answer would be."""

    change: str
    speedup: float

    def __str__(self) -> str:
        return f"{self.change}: {self.speedup:.1f} times faster"


def advise(facts: ModelFacts, forecast: Forecast, kernels: Callable[[set[str]], dict[str, int]]) -> list[Advice]:
    """Changes that pay, the best first.

    Args:
        facts: that the forecast's plan was made from.
        kernels: for each kernel, the rows that it is faster for than decoding.
    """
    now = forecast.answer_seconds
    found = []
    for change, plan in _others(facts, forecast.plan, kernels):
        speedup = now / replace(forecast, plan=plan).answer_seconds
        if speedup >= WORTH:
            found.append(Advice(change, speedup))
    return sorted(found, key=lambda advice: -advice.speedup)


def _others(facts: ModelFacts, plan: Plan, kernels: Callable[[set[str]], dict[str, int]]) -> Iterator[tuple[str, Plan]]:
    host = plan.host
    host_bytes = None if host is None else host.budget_bytes
    for kind in BITS if not any(node.value_bytes for root in (*facts.body, facts.head) for node in _all(root)) else ():
        packed = quantised(facts, kind, kernels)
        if packed is not None:
            yield f"quantization={kind!r}", _planned(packed, plan.budget_bytes, host_bytes)
    if not plan.streams:
        return
    if host is not None:
        missing = comfortable_host_bytes(plan) - host.budget_bytes
        for more in (size for size in SPARE_MEMORY if plan.disk_bytes):
            size = min(more, max(missing, GIB))
            yield f"{format_size(size)} more host memory", _planned(facts, plan.budget_bytes, host.budget_bytes + size)
            if size < more:
                break
    missing = comfortable_bytes(facts) - plan.budget_bytes
    for more in SPARE_MEMORY:
        size = min(more, max(missing, GIB))
        try:
            larger = _planned(facts, plan.budget_bytes + size, host_bytes)
        except BudgetTooSmall:
            continue
        yield f"{format_size(size)} more memory" + (" on the device" if host is not None else ""), larger
        if size < more:
            break


def quantised(facts: ModelFacts, kind: str, kernels: Callable[[set[str]], dict[str, int]]) -> ModelFacts | None:
    """*facts* of the model packed as *kind*; ``None`` if it has no Linear that could be."""
    body = tuple(_packed(node, kind, facts.itemsize) for node in facts.body)
    head = _packed(facts.head, kind, facts.itemsize)
    if body == facts.body and head == facts.head:
        return None
    fused = kernels({KERNELS[kind]}) if kind in KERNELS and not facts.is_on_device else {}
    return replace(facts, body=body, head=head, fused_rows={**facts.fused_rows, **fused})


def _packed(node: WeightNode, kind: str, itemsize: int) -> WeightNode:
    if not node.num_rows or node.num_rows < ROW_STEP:
        return replace(node, children=tuple(_packed(child, kind, itemsize) for child in node.children))
    num_values = node.compute_bytes // itemsize
    columns = num_values // node.num_rows
    stored = int(num_values * BITS[kind] / 8)
    tile = min(num_values, max(ROW_STEP * columns, 2**20))
    return replace(
        node,
        own_bytes=stored,
        compute_bytes=stored,
        row_step=ROW_STEP,
        decode_bytes=tile * (itemsize + 12),
        value_bytes=node.compute_bytes,
        codec=kind,
        kernel=KERNELS.get(kind, ""),
    )


def _planned(facts: ModelFacts, memory_bytes: int, host_bytes: int | None) -> Plan:
    if host_bytes is None:
        return make_plan(facts, memory_bytes)
    return make_device_plan(facts, memory_bytes, host_bytes)


def _all(node: WeightNode) -> Iterator[WeightNode]:
    yield node
    for child in node.children:
        yield from _all(child)

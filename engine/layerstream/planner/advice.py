"""The one change that would help most: other plans for the same model on the same machine, compared. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from layerstream.core.formats import FORMATS, Format
from layerstream.core.sizes import format_size
from layerstream.errors import BudgetTooSmall
from layerstream.planner.facts import ModelFacts
from layerstream.planner.forecast import Forecast
from layerstream.planner.on_device import comfortable_host_bytes, make_device_plan
from layerstream.planner.on_devices import make_devices_plan
from layerstream.planner.on_host import comfortable_bytes, make_plan
from layerstream.planner.plan import Plan
from layerstream.planner.units import ExpertsNode, WeightNode, linears

ROW_STEP = 64  # of all formats, near enough
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
    found: list[Advice] = []
    for change, plan in _others(facts, forecast.plan, kernels):
        speedup = now / replace(forecast, plan=plan).answer_seconds
        if speedup >= WORTH:
            found.append(Advice(change, speedup))
    return sorted(found, key=lambda advice: -advice.speedup)


def _others(facts: ModelFacts, plan: Plan, kernels: Callable[[set[str]], dict[str, int]]) -> Iterator[tuple[str, Plan]]:
    for change, changed, memory, host in _changes(facts, plan, kernels):
        with contextlib.suppress(BudgetTooSmall):
            if host is None:
                yield change, make_plan(changed, memory)
            elif plan.parts:
                memories = [part.budget_bytes for part in plan.parts]
                yield change, make_devices_plan(changed, "auto", memories, host)
            else:
                yield change, make_device_plan(changed, memory, host)


def _changes(
    facts: ModelFacts, plan: Plan, kernels: Callable[[set[str]], dict[str, int]]
) -> Iterator[tuple[str, ModelFacts, int, int | None]]:
    """What it is called, and the model, the memory and the host's memory after it."""
    memory, host = plan.budget_bytes, None if plan.host is None else plan.host.budget_bytes
    if not any(True for root in (*facts.body, facts.head) for _ in linears(root)):
        for kind in sorted(FORMATS, key=lambda kind: FORMATS[kind].bits):  # of two that pay alike, the smaller
            packed = quantised(facts, kind, kernels)
            if packed is not None:
                yield f"quantization={kind!r}", packed, memory, host
    if not plan.streams:
        return
    if host is not None and plan.disk_bytes:
        for size in _steps(comfortable_host_bytes(plan) - host):
            yield f"{format_size(size)} more host memory", facts, memory, host + size
    if plan.parts:
        return
    where = "" if host is None else " on the device"
    for size in _steps(comfortable_bytes(facts) - memory):
        yield f"{format_size(size)} more memory{where}", facts, memory + size, host


def _steps(missing: int) -> Iterator[int]:
    """Memory that one would add: as people buy it, up to what is missing."""
    for size in SPARE_MEMORY:
        if size >= missing:
            yield -(-missing // GIB) * GIB
            return
        yield size


def quantised(facts: ModelFacts, kind: str, kernels: Callable[[set[str]], dict[str, int]]) -> ModelFacts | None:
    """*facts* of the model packed as *kind*; ``None`` if it has no Linear that could be."""
    to = FORMATS[kind]
    body = tuple(_packed(node, to, facts.itemsize) for node in facts.body)
    routed = tuple(_packed(node, to, facts.itemsize) for node in facts.routed_body)
    experts = tuple(_packed_experts(node, to) for node in facts.experts) if to.packs_experts else facts.experts
    head = _packed(facts.head, to, facts.itemsize)
    if body == facts.body and head == facts.head and experts == facts.experts:
        return None
    fused = kernels({to.kernel}) if to.kernel and not facts.is_on_device else {}
    fused_rows = {**facts.fused_rows, **fused}
    return replace(facts, body=body, routed_body=routed, experts=experts, head=head, fused_rows=fused_rows)


def _packed_experts(node: ExpertsNode, to: Format) -> ExpertsNode:
    stored = int(node.num_values * to.bits / 8)
    return replace(
        node,
        expert_bytes=stored,
        slot_bytes=node.slot_bytes - node.expert_bytes + stored,
        scratch_bytes=node.num_values * (2 + 12),
        codec=to.name,
        kernel=to.kernel,
    )


def _packed(node: WeightNode, to: Format, itemsize: int) -> WeightNode:
    if not node.num_rows or node.num_rows < ROW_STEP:
        return replace(node, children=tuple(_packed(child, to, itemsize) for child in node.children))
    num_values = node.compute_bytes // itemsize
    columns = num_values // node.num_rows
    stored = int(num_values * to.bits / 8)
    tile = min(num_values, max(ROW_STEP * columns, 2**20))
    return replace(
        node,
        own_bytes=stored,
        compute_bytes=stored,
        row_step=ROW_STEP,
        decode_bytes=tile * (itemsize + 12),
        value_bytes=node.compute_bytes,
        codec=to.name,
        kernel=to.kernel,
    )

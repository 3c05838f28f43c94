"""Plans for an accelerator: its memory, and the host's behind it.

Device memory is spent as on a host, but for KV: where weights stream, KV has its place on the host, and only that of
the layers in hand is on the device. States of recurrent layers stay on the device that computes the layer. Host memory
goes to KV first, then to weights that stay there; what has no room is read from disk for every sweep, through a ring
for each device. Where experts come as they are routed to, they have what is left of either memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layerstream.core.sizes import format_size
from layerstream.errors import BudgetTooSmall
from layerstream.kv.device_rows import STAGED_ROWS
from layerstream.planner import on_host
from layerstream.planner.experts import HOST_ROWS
from layerstream.planner.facts import ModelFacts
from layerstream.planner.plan import HostPlan, Plan
from layerstream.planner.units import PlannedUnit, choose_residents

HOST_KV_SHARE = 0.25  # of host memory, for KV beyond what is wanted first
HOST_WORKSPACE_BYTES = 64 * 2**20  # bounce buffers, embedding rows, logits
HOST_LOGIT_BYTES = 32 * 2**20  # that are within it
HOST_RING_UNITS = 4  # reads run ahead of copies
HOST_RING_BYTES = 256 * 2**20  # more than that hides nothing


def make_device_plan(facts: ModelFacts, memory_bytes: int, host_bytes: int) -> Plan:
    """Spend *memory_bytes* of the device and *host_bytes* of the host.

    Raises:
        BudgetTooSmall: names the minimum of the one that is short.
    """
    return with_host(on_host.make_plan(with_host_kv(facts, host_bytes), memory_bytes), host_bytes)


def with_host_kv(facts: ModelFacts, host_bytes: int) -> ModelFacts:
    """*facts* with as much KV as has room among *host_bytes*."""
    if not facts.kv_token_bytes:
        return facts
    staged = max(facts.streaming_rows, facts.resident_rows, STAGED_ROWS)
    room = host_bytes - HOST_WORKSPACE_BYTES - staged * facts.kv_token_bytes
    wanted = on_host.WANTED_KV_TOKENS * facts.kv_token_bytes
    kv_room = max(on_host.MIN_KV_TOKENS * facts.kv_token_bytes, min(room // 2, wanted), int(HOST_KV_SHARE * room))
    return replace(facts, kv_tokens=min(facts.kv_tokens, kv_room // facts.kv_token_bytes))


def comfortable_host_bytes(plan: Plan) -> int:
    """Host memory from which on nothing is read from disk for a sweep."""
    assert plan.host is not None
    units = sum(unit.ring_bytes for _, unit in _streamed(plan))
    experts = plan.facts.num_experts * plan.weights.slot_bytes if plan.weights.expert_slots else 0
    return plan.host.workspace_bytes + plan.host.kv_bytes + units + experts


def with_host(plan: Plan, host_bytes: int) -> Plan:
    """*plan* with what *host_bytes* are spent on.

    Raises:
        BudgetTooSmall: names the minimum.
    """
    kv_bytes = plan.num_pages * plan.page_tokens * plan.facts.kv_token_bytes
    streamed = _streamed(plan)
    devices = [_streamed(part) for part in plan.by_device]
    workspace_bytes = HOST_WORKSPACE_BYTES + max(0, plan.logit_bytes - HOST_LOGIT_BYTES)
    workspace_bytes += plan.staged_rows * plan.facts.kv_token_bytes + _host_compute_bytes(plan)
    room = host_bytes - workspace_bytes - kv_bytes
    least_ring = sum(max((unit.ring_bytes for _, unit in units), default=0) for units in devices)
    passing = _passing_slots(plan, room, room - least_ring)
    passing_bytes = passing * plan.weights.slot_bytes
    room -= passing_bytes
    sizes = [unit.ring_bytes for _, unit in streamed]
    rings = [0 for _ in devices]
    if sum(sizes) > room:
        rings = [_ring_bytes([unit for _, unit in units], room // len(devices)) for units in devices]
    ring_bytes = sum(rings)
    if ring_bytes > room or room < 0:
        required = host_bytes - room + ring_bytes
        raise BudgetTooSmall(
            f"host memory of {format_size(host_bytes)} is too small: {format_size(required)} are needed for KV of "
            f"{plan.num_pages * plan.page_tokens:,} tokens, for reading, and for a ring between disk and device"
            f"{', and for experts on their way' if passing_bytes else ''}; "
            f"pass host_memory={format_size(required, exact=True)!r} or more",
            budget_bytes=host_bytes,
            required_bytes=required,
        )
    chosen = [streamed[position] for position in sorted(choose_residents(sizes, room - ring_bytes))]
    residents = frozenset(index for index, _ in chosen)
    resident_bytes = sum(unit.ring_bytes for _, unit in chosen)
    slots = _host_slots(plan, passing, passing_bytes + room - ring_bytes - resident_bytes)
    weights = replace(plan.weights, host_residents=residents, host_ring_bytes=ring_bytes, host_expert_slots=slots)
    return replace(
        plan,
        weights=weights,
        host=HostPlan(host_bytes, resident_bytes, ring_bytes, kv_bytes, workspace_bytes, slots * weights.slot_bytes),
        parts=_parts_with_host(plan.parts, {unit.name for _, unit in chosen}, rings, slots),
    )


def _host_compute_bytes(plan: Plan) -> int:
    """What the processor computes experts with: one of them decoded, and what they are given and give, for as many rows
    as a sweep has."""
    facts = plan.facts
    if not plan.weights.expert_slots or facts.host_fused_rows is None:
        return 0
    rows = max(HOST_ROWS, plan.max_sweep_rows)
    return facts.expert_scratch_bytes + 2 * rows * facts.hidden_size * facts.itemsize


def _passing_slots(plan: Plan, room: int, most: int) -> int:
    """Experts that there is *room* for while they pass, before anything else stays, in *most* bytes: one for each
    device at the least."""
    if not plan.weights.expert_slots:
        return 0
    most = min(most, on_host.EXPERTS_BYTES, int(on_host.EXPERTS_SHARE * room))
    least = sum(part.weights.expert_slots > 0 for part in plan.by_device)
    return min(plan.facts.num_experts, max(least, most // plan.weights.slot_bytes))


def _host_slots(plan: Plan, passing: int, room: int) -> int:
    """Experts that *room* on the host is for: those that the device does not have, and *passing* ones."""
    if not passing:
        return 0
    others = plan.facts.num_experts - plan.weights.expert_slots
    return min(others + passing, plan.facts.num_experts, room // plan.weights.slot_bytes)


def _parts_with_host(parts: Sequence[Plan], staying: set[str], rings: Sequence[int], slots: int) -> tuple[Plan, ...]:
    """The plans of several devices, of whose units those named *staying* stay on the host, and behind which there are
    *slots* for experts."""
    found: list[Plan] = []
    for part, ring_bytes, count in zip(parts, rings, _shared(slots, parts), strict=False):
        residents = frozenset(index for index, unit in _streamed(part) if unit.name in staying)
        weights = replace(part.weights, host_residents=residents, host_ring_bytes=ring_bytes, host_expert_slots=count)
        found.append(replace(part, weights=weights))
    return tuple(found)


def _shared(slots: int, parts: Sequence[Plan]) -> list[int]:
    """*slots* of host memory for experts, shared out among *parts*: one for each that has experts, and the others in
    proportion to those that its device has no slot for."""
    banks = [part.weights.expert_slots > 0 for part in parts]
    missing = [
        part.facts.num_experts - part.weights.expert_slots if has else 0 for part, has in zip(parts, banks, strict=True)
    ]
    more, total = slots - sum(banks), max(1, sum(missing))
    return [
        min(part.facts.num_experts, 1 + more * share // total) if has else 0
        for part, has, share in zip(parts, banks, missing, strict=True)
    ]


def _streamed(plan: Plan) -> list[tuple[int, PlannedUnit]]:
    """Units that are not resident on a device, with their places."""
    return [(index, unit) for index, unit in enumerate(plan.weights.units) if index not in plan.weights.residents]


def _ring_bytes(units: Sequence[PlannedUnit], room: int) -> int:
    """Of the ring between disk and device: a few units, one at the least."""
    if not units:
        return 0
    largest = max(unit.ring_bytes for unit in units)
    wanted = max(HOST_RING_UNITS * largest, min(HOST_RING_BYTES, sum(unit.ring_bytes for unit in units)))
    return max(largest, min(wanted, room // 2))

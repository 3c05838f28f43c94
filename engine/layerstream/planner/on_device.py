"""Plans for an accelerator: its memory, and the host's behind it.

Device memory is spent as on a host, but for KV: where weights stream, KV has its place on the host, and only that of
the layers in hand is on the device. Host memory goes to KV first, then to weights that stay there; what has no room is
read from disk for every sweep, through a ring.
"""

from __future__ import annotations

from dataclasses import replace

from layerstream.errors import BudgetTooSmall
from layerstream.planner import spending
from layerstream.planner.facts import ModelFacts
from layerstream.planner.plan import HostPlan, Plan
from layerstream.sizes import format_size
from layerstream.streaming.residency import PlannedUnit, choose_residents

HOST_KV_SHARE = 0.25  # of host memory, for KV beyond what is wanted first
HOST_WORKSPACE_BYTES = 64 * 2**20  # bounce buffers, embedding rows, logits
HOST_RING_UNITS = 4  # reads run ahead of copies
HOST_RING_BYTES = 256 * 2**20  # more than that hides nothing


def make_device_plan(facts: ModelFacts, memory_bytes: int, host_bytes: int) -> Plan:
    """Spend *memory_bytes* of the device and *host_bytes* of the host.

    Raises:
        BudgetTooSmall: names the minimum of the one that is short.
    """
    room = host_bytes - HOST_WORKSPACE_BYTES
    wanted = spending.WANTED_KV_TOKENS * facts.kv_token_bytes
    kv_room = max(spending.MIN_KV_TOKENS * facts.kv_token_bytes, min(room // 2, wanted), int(HOST_KV_SHARE * room))
    plan = spending.make_plan(replace(facts, kv_tokens=kv_room // facts.kv_token_bytes), memory_bytes)
    return _with_host(plan, host_bytes)


def comfortable_host_bytes(plan: Plan) -> int:
    """Host memory from which on nothing is read from disk for a sweep."""
    assert plan.host is not None
    streamed = [unit for index, unit in enumerate(plan.weights.units) if index not in plan.weights.residents]
    return HOST_WORKSPACE_BYTES + plan.host.kv_bytes + sum(unit.ring_bytes for unit in streamed)


def _with_host(plan: Plan, host_bytes: int) -> Plan:
    kv_bytes = plan.num_pages * plan.page_tokens * plan.facts.kv_token_bytes
    streamed = [index for index in range(len(plan.weights.units)) if index not in plan.weights.residents]
    units = [plan.weights.units[index] for index in streamed]
    room = host_bytes - HOST_WORKSPACE_BYTES - kv_bytes
    sizes = [unit.ring_bytes for unit in units]
    ring_bytes = 0 if sum(sizes) <= room else _ring_bytes(units, room)
    if ring_bytes > room or room < 0:
        required = host_bytes - room + ring_bytes
        raise BudgetTooSmall(
            f"host memory of {format_size(host_bytes)} is too small: {format_size(required)} are needed for KV of "
            f"{plan.num_pages * plan.page_tokens:,} tokens, for reading, and for a ring between disk and device; "
            f"pass host_memory={format_size(required, exact=True)!r} or more",
            budget_bytes=host_bytes,
            required_bytes=required,
        )
    chosen = choose_residents(sizes, room - ring_bytes)
    residents = frozenset(streamed[position] for position in chosen)
    weights = replace(plan.weights, host_residents=residents, host_ring_bytes=ring_bytes)
    resident_bytes = sum(sizes[position] for position in chosen)
    return replace(
        plan, weights=weights, host=HostPlan(host_bytes, resident_bytes, ring_bytes, kv_bytes, HOST_WORKSPACE_BYTES)
    )


def _ring_bytes(units: list[PlannedUnit], room: int) -> int:
    """Of the ring between disk and device: a few units, one at the least."""
    largest = max(unit.ring_bytes for unit in units)
    wanted = max(HOST_RING_UNITS * largest, min(HOST_RING_BYTES, sum(unit.ring_bytes for unit in units)))
    return max(largest, min(wanted, room // 2))

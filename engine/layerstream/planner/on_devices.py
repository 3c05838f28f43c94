"""Plans for several accelerators: one for each, of its own layers, that agree on what a sweep carries. Pure.

Every device has a ring, residents, KV, and slots for the experts of its own layers, within its own ceiling; host memory
is behind all of them. What shapes a sweep (tokens, guesses, pages) is what the tightest of them has room for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from layerstream.errors import BudgetTooSmall
from layerstream.planner.facts import ModelFacts
from layerstream.planner.on_device import with_host, with_host_kv
from layerstream.planner.on_host import make_plan
from layerstream.planner.placement import in_order, in_ranges, in_turns
from layerstream.planner.plan import Plan
from layerstream.planner.units import ExpertsNode, PlannedUnit, UnitPlan, WeightNode

TRIES = 4  # at taking turns: what stays depends on who has which layer, and the other way round


def make_devices_plan(facts: ModelFacts, device_map: str, memories: Sequence[int], host_bytes: int) -> Plan:
    """Spend *memories*, of a device each, and *host_bytes* behind all of them; ``device_map`` as in
    :mod:`layerstream.planner.placement`. Devices that are left without a layer are not in the plan.

    Raises:
        BudgetTooSmall: names the minimum of the one that is short.
    """
    model = _Layers.of(with_host_kv(facts, host_bytes))
    return with_host(_joined(model, _place(model, device_map, memories), memories), host_bytes)


@dataclass(frozen=True, slots=True)
class _Layers:
    """*facts* with the nodes of the body by the layer that they go with, as a whole and without experts that come as
    they are routed to; chunks are the same where weights stream and where they do not."""

    facts: ModelFacts
    nodes: tuple[tuple[WeightNode, ...], ...]
    routed: tuple[tuple[WeightNode, ...], ...]

    @classmethod
    def of(cls, facts: ModelFacts) -> _Layers:
        facts = replace(facts, chunk_tokens=facts.streaming_chunk_tokens)
        return cls(facts, _by_layer(facts.body), _by_layer(facts.routed_body))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each; the head's are the last one's."""
        sizes = [sum(node.total_compute_bytes for node in nodes) for nodes in self.nodes]
        sizes[-1] += self.facts.head.total_compute_bytes
        return sizes

    def some(self, chosen: Sequence[int]) -> ModelFacts:
        """Facts of the model that has those alone."""
        has_head = len(self.nodes) - 1 in chosen
        return replace(
            self.with_experts(chosen),
            body=tuple(node for layer in chosen for node in self.nodes[layer]),
            routed_body=tuple(node for layer in chosen for node in self.routed[layer]) if self.facts.experts else (),
            head=self.facts.head if has_head else WeightNode(""),
            vocab_size=self.facts.vocab_size if has_head else 0,
            embedding_bytes=0,  # rows come from disk, to the first device
            layer_kv=tuple(self.facts.layer_kv[layer] for layer in chosen),
            layer_state=_some(self.facts.layer_state, chosen),
            layer_state_row=_some(self.facts.layer_state_row, chosen),
        )

    def with_experts(self, chosen: Sequence[int]) -> ModelFacts:
        """Facts in which the experts of the layers *chosen* alone come as they are routed to."""
        names = tuple(node.name for layer in chosen for node in self.nodes[layer])
        shares = iter(self.facts.expert_shares)
        experts: list[ExpertsNode] = []
        known: list[float] = []
        for node in self.facts.experts:
            used = list(islice(shares, node.num_experts))
            if _is_below(node.name, names):
                experts.append(node)
                known += used
        return replace(self.facts, experts=tuple(experts), expert_shares=tuple(known))


def _by_layer(body: Sequence[WeightNode]) -> tuple[tuple[WeightNode, ...], ...]:
    """*body* cut before each layer but the first."""
    layers: list[list[WeightNode]] = []
    before: list[WeightNode] = []
    for node in body:
        if node.layer is not None:
            layers.append([node])
        else:
            (layers[-1] if layers else before).append(node)
    if not layers:
        layers.append([])
    layers[0][:0] = before
    return tuple(map(tuple, layers))


def _some(sizes: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    """Of *sizes* by layer those of the *chosen*; none, if there are none."""
    return tuple(sizes[layer] for layer in chosen) if sizes else ()


def _place(model: _Layers, device_map: str, memories: Sequence[int]) -> tuple[int, ...]:
    """The device of each layer."""
    if device_map == "sequential":
        return in_order(len(model.nodes), len(memories), lambda device, layers: _stays(model, layers, memories[device]))
    ranges = in_ranges(model.sizes, memories)
    if device_map == "balanced":
        return ranges
    tried: dict[tuple[int, ...], int] = {}
    places, rooms = ranges, [0 for _ in memories]
    for _ in range(TRIES):
        with contextlib.suppress(BudgetTooSmall):
            plan = _joined(model, places, memories)
            if not plan.streams:
                return places
            if places != ranges:
                tried[places] = plan.link_bytes
            rooms = [0 for _ in memories]
            for device, part in zip(plan.devices, plan.parts, strict=True):
                rooms[device] = part.resident_bytes
        places = in_turns(model.sizes, rooms, last=max(range(len(memories)), key=lambda device: memories[device]))
    return min(tried, key=lambda places: tried[places], default=places)


def _stays(model: _Layers, layers: Sequence[int], memory_bytes: int) -> bool:
    try:
        return not make_plan(model.some(layers), memory_bytes).streams
    except BudgetTooSmall:
        return False


def _joined(model: _Layers, places: Sequence[int], memories: Sequence[int]) -> Plan:
    """A plan whose parts are one for each device that has a layer."""
    devices = tuple(sorted(set(places)))
    chosen = [[layer for layer, place in enumerate(places) if place == device] for device in devices]
    parts = [make_plan(model.some(layers), memories[device]) for device, layers in zip(devices, chosen, strict=True)]
    slots = min((part.num_slots for part in parts if part.num_slots), default=0)
    parts = [
        replace(
            part,
            num_slots=slots,
            num_pages=min(other.num_pages for other in parts),
            max_sweep_tokens=min(other.max_sweep_tokens for other in parts),
            max_draft_rows=min(other.max_draft_rows for other in parts),
            max_sequences=min(other.max_sequences for other in parts),
        )
        for part in parts
    ]
    routed = [layer for layer, place in enumerate(places) if parts[devices.index(place)].weights.expert_slots]
    return Plan(
        budget_bytes=sum(part.budget_bytes for part in parts),
        facts=replace(model.with_experts(routed), chunk_tokens=parts[0].chunk_tokens, embedding_bytes=0),
        weights=_joined_weights(model, [devices.index(place) for place in places], parts),
        embedding_resident=False,
        num_pages=parts[0].num_pages,
        page_tokens=parts[0].page_tokens,
        activation_bytes=sum(part.activation_bytes for part in parts),
        max_sweep_tokens=parts[0].max_sweep_tokens,
        max_draft_rows=parts[0].max_draft_rows,
        max_sequences=parts[0].max_sequences,
        num_slots=slots,
        parts=tuple(parts),
        devices=devices,
        layers=tuple(devices.index(place) for place in places),
    )


def _joined_weights(model: _Layers, places: Sequence[int], parts: Sequence[Plan]) -> UnitPlan:
    """The units of all *parts* in the order in which a sweep passes them."""
    body: list[PlannedUnit] = []
    residents: set[int] = set()
    passed = [0 for _ in parts]
    for nodes, place in zip(model.nodes, places, strict=True):
        weights, names = parts[place].weights, tuple(node.name for node in nodes)
        while passed[place] < len(weights.body) and _is_below(weights.body[passed[place]].module, names):
            if passed[place] in weights.residents:
                residents.add(len(body))
            body.append(weights.body[passed[place]])
            passed[place] += 1
    last = parts[places[-1]].weights
    residents |= {len(body) + at for at in range(len(last.head)) if len(last.body) + at in last.residents}
    return UnitPlan(
        tuple(body),
        last.head,
        frozenset(residents),
        sum(part.weights.ring_bytes for part in parts),
        expert_slots=sum(part.weights.expert_slots for part in parts),
        slot_bytes=max(part.weights.slot_bytes for part in parts),
    )


def _is_below(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)

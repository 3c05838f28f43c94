"""What fits where, before anything is loaded. Pure: sizes in, :class:`Plan` out.

A budget is spent in this order: what a sweep computes with (activations, logits, embedding rows), slots for states of
recurrent layers, pinned weights, KV pages, the ring, and with all that is left a fixed set of resident units. If
everything fits, nothing streams.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from layerstream.core.sizes import format_size
from layerstream.errors import BudgetTooSmall
from layerstream.planner.facts import STREAMING_ROWS, ModelFacts
from layerstream.planner.plan import Plan
from layerstream.planner.states import (
    MOST_SLOTS,
    STATES_SHARE,
    fewer_sequences,
    least_state_bytes,
    resident_share_bytes,
    slots_within,
    snapshot_bytes,
)
from layerstream.planner.units import PlannedUnit, UnitPlan, choose_residents, cut_units, largest_unit, slice_rows

LEAST_SEQUENCES = 32  # that run at once: as many as a search may have beams
MAX_SEQUENCES = 256
SEQUENCES_SHARE = 0.02  # of the budget, for the logits of more than the least
SAMPLING_BYTES = 56  # per token of the vocabulary, of one row (measured): scores in fp32, sorted, then in fp64
MAX_DRAFT_ROWS = 128  # guesses in one sweep
DRAFT_SHARE = 0.05  # of the budget, for their logits and KV
ACTIVATION_SHARE = 0.2  # of the budget; past it, a sweep carries fewer tokens
MIN_KV_TOKENS = 256
WANTED_KV_TOKENS = 4096 + 512  # a retrieved context; question and answer
WANTED_KV_SHARE = 0.45  # of the budget, for that
MORE_KV_SHARE = 0.15  # of the budget, beyond that: every page is a piece of a layer that cannot stay
TRANSIT_SHARE = 0.04  # of the budget, for KV that streams past: a page of it costs a tenth of a page that stays
RESIDENT_TRANSIT_SHARE = 0.25  # of the room for KV, where the weights take the rest
MAX_KV_SEQUENCES = 16  # full-length sequences that KV is reserved for at most
RING_UNITS = 2.25  # one computing, one arriving, and the beginning of the next
RING_SHARE = 0.6  # of what weights may take; past it, units are cut finer
EXPERTS_SHARE = 0.25  # of what weights may take: experts on their way come before anything else stays
EXPERTS_BYTES = 32 * 2**20  # no more than that
HEAD_SLICE_BYTES = 64 * 2**20
FINEST_UNIT_BYTES = 128 * 2**10


def make_plan(facts: ModelFacts, budget_bytes: int) -> Plan:
    """Spend *budget_bytes* on the model of *facts*.

    Raises:
        BudgetTooSmall: names the minimum, and what needs it.
    """
    plans = [_resident_plan(facts, budget_bytes, with_embedding=choice) for choice in (True, False)]
    resident = min((plan for plan in plans if plan), key=_shortcomings, default=None)
    return resident or _streaming_plan(facts, budget_bytes)


def comfortable_bytes(facts: ModelFacts) -> int:
    """The budget from which on nothing streams and KV has all the room that it may take."""
    fixed = facts.compute_bytes + _activation_bytes(facts, facts.sweep_tokens) + facts.decode_bytes
    fixed += sum(node.value_bytes - node.own_bytes for node in facts.without_kernel.values())
    return fixed + _most_kv_bytes(facts) + MOST_SLOTS * facts.state_bytes


def _resident_plan(facts: ModelFacts, budget_bytes: int, *, with_embedding: bool) -> Plan | None:
    """Everything resident, or ``None`` if that does not fit.

    Without the embedding, whose rows then come from disk, only where KV has all the room that it wants first.
    """
    facts = facts if with_embedding else replace(facts, embedding_bytes=0)
    least_kv = _least_kv_bytes(facts)
    if not with_embedding:
        least_kv = max(least_kv, _first_kv_bytes(facts, budget_bytes))
    activations = _activation_bytes(facts, facts.sweep_tokens) + facts.decode_bytes
    left = budget_bytes - activations - facts.compute_bytes
    spare = left - least_kv - least_state_bytes(facts)
    if spare < 0:
        return None
    rows = _SampledRows.of(facts, budget_bytes, spare - snapshot_bytes(facts, spare))
    activations += rows.num_bytes
    left -= rows.num_bytes
    share = resident_share_bytes(left, _first_kv_bytes(facts, budget_bytes), _most_kv_bytes(facts))
    slots = slots_within(facts, share, spare - rows.num_bytes)
    left -= slots * facts.state_bytes
    num_pages, num_transit = _num_pages(facts, left), 0
    if num_pages * facts.shared_tokens < facts.context_length:
        spare = left - _least_kv_bytes(facts)
        num_transit = _num_transit(facts, min(int(RESIDENT_TRANSIT_SHARE * left), spare), num_pages)
        num_pages = _num_pages(facts, left - num_transit * facts.slot_bytes)
    body = tuple(unit for node in facts.body for unit in cut_units(node, node.total_bytes))
    head = _whole_head(facts)
    spare = left - num_transit * facts.slot_bytes - _first_kv_bytes(facts, budget_bytes)
    body, head, taken = _decode_some(facts, body, head, spare)
    if taken:
        num_pages = _num_pages(facts, left - num_transit * facts.slot_bytes - taken)
    return Plan(
        budget_bytes=budget_bytes,
        facts=facts,
        weights=UnitPlan(body, head, residents=frozenset(range(len(body + head))), ring_bytes=0),
        embedding_resident=with_embedding,
        num_pages=num_pages,
        page_tokens=facts.shared_tokens,
        activation_bytes=activations + num_pages * facts.shared_tokens * facts.attending_bytes,
        max_sweep_tokens=facts.sweep_tokens,
        max_draft_rows=rows.guesses,
        max_sequences=fewer_sequences(facts, rows.sequences, slots),
        num_transit=num_transit,
        num_slots=slots,
    )


def _whole_head(facts: ModelFacts) -> tuple[PlannedUnit, ...]:
    """The head in one piece; nothing where another device has it."""
    head = facts.head
    return (PlannedUnit(head.name, head.total_bytes, head.total_compute_bytes),) if head.total_bytes else ()


def _shortcomings(plan: Plan) -> tuple[int, int]:
    """KV that is missing, and quantised weights that every sweep decodes."""
    missing_kv = max(0, _first_kv_bytes(plan.facts, plan.budget_bytes) - plan.kv_bytes)
    return missing_kv, _undecoded_bytes(plan)


def _undecoded_bytes(plan: Plan) -> int:
    nodes = plan.facts.without_kernel
    return sum(unit.num_bytes for unit in plan.weights.units if unit.module in nodes and not unit.stays_decoded)


def _decode_some(
    facts: ModelFacts, body: tuple[PlannedUnit, ...], head: tuple[PlannedUnit, ...], spare: int
) -> tuple[tuple[PlannedUnit, ...], tuple[PlannedUnit, ...], int]:
    """Let quantised matrices that no kernel multiplies by stay decoded, as far as *spare* bytes go, the head first:
    decoding them in every sweep takes longer than anything else. Also what that takes."""
    nodes = facts.without_kernel
    taken = 0

    def decode(unit: PlannedUnit) -> PlannedUnit:
        nonlocal taken
        node = nodes.get(unit.module)
        if node is None:
            return unit
        more = node.value_bytes - node.own_bytes
        if taken + more > spare:
            return unit
        taken += more
        return replace(unit, compute_bytes=unit.compute_bytes + more, stays_decoded=True)

    decoded_head = tuple(map(decode, head))
    return tuple(map(decode, body)), decoded_head, taken


def _streaming_plan(facts: ModelFacts, budget_bytes: int) -> Plan:
    facts = replace(facts, chunk_tokens=facts.streaming_chunk_tokens, kv_rides=facts.is_on_device)
    with contextlib.suppress(BudgetTooSmall):
        plan = _cut_plan(facts, budget_bytes)
        if not _cuts_linears(plan):
            return plan
    return _cut_plan(replace(facts, is_cut=True), budget_bytes)


def _cuts_linears(plan: Plan) -> bool:
    body = plan.facts.streamed_body
    whole = {node.name for node in body}
    inner = {child.name for node in body for child in node.children if not child.num_rows}
    return any(unit.module not in whole | inner for unit in plan.weights.body if not unit.pinned)


def _cut_plan(facts: ModelFacts, budget_bytes: int) -> Plan:
    floor = _floor_bytes(facts)
    spare = budget_bytes - floor - _activation_bytes(facts, max(facts.chunk_tokens, facts.prompt_rows))
    sweep_tokens = _sweep_tokens(facts, budget_bytes, floor + snapshot_bytes(facts, spare))
    activations = _activation_bytes(facts, sweep_tokens)
    least = floor + activations
    if least > budget_bytes:
        raise _too_small(facts, budget_bytes, least)
    spare = budget_bytes - least
    rows = _SampledRows.of(facts, budget_bytes, spare - snapshot_bytes(facts, spare))
    activations += rows.num_bytes
    least += rows.num_bytes
    slots = slots_within(facts, STATES_SHARE * budget_bytes, budget_bytes - least)
    state_bytes = slots * facts.state_bytes
    least += state_bytes - least_state_bytes(facts)
    least_kv = _least_kv_bytes(facts)
    num_pages = _num_pages(facts, min(_wanted_kv_bytes(facts, budget_bytes), least_kv + budget_bytes - least))
    for_weights = budget_bytes - activations - state_bytes - num_pages * facts.shared_tokens * facts.kv_cost_bytes
    num_transit = 0
    if num_pages * facts.shared_tokens < facts.context_length:
        spare = for_weights - (floor - least_kv - least_state_bytes(facts))
        num_transit = _num_transit(facts, min(int(TRANSIT_SHARE * budget_bytes), spare), num_pages)
        for_weights -= num_transit * facts.slot_bytes
    limit = _unit_limit(facts, for_weights)
    body, head = _cut_all(facts, limit)
    everything = body + head
    pinned = frozenset(index for index, unit in enumerate(everything) if unit.pinned)
    scratch_bytes = _scratch_bytes(everything) + facts.expert_scratch_bytes
    for_weights -= sum(everything[index].compute_bytes for index in pinned) + scratch_bytes
    passing = _passing_experts(facts, for_weights) * facts.slot_bytes_of_expert
    for_weights -= passing
    free = [index for index in range(len(everything)) if index not in pinned]
    head_first = [position for position, index in enumerate(free) if index >= len(body)]
    sizes = [everything[index].compute_bytes for index in free]
    ring_bytes = min(int(RING_UNITS * largest_unit(everything)), for_weights) if sum(sizes) > for_weights else 0
    chosen = choose_residents(sizes, for_weights - ring_bytes, head_first)
    residents = pinned | {free[position] for position in chosen}
    spare = for_weights - ring_bytes - sum(sizes[position] for position in chosen)
    experts = min(facts.num_experts, (passing + spare) // facts.slot_bytes_of_expert) if facts.experts else 0
    return Plan(
        budget_bytes=budget_bytes,
        facts=facts,
        weights=UnitPlan(
            body,
            head,
            residents,
            ring_bytes,
            expert_slots=experts,
            slot_bytes=facts.slot_bytes_of_expert,
        ),
        embedding_resident=False,
        num_pages=num_pages,
        page_tokens=facts.shared_tokens,
        activation_bytes=activations + scratch_bytes + num_pages * facts.shared_tokens * facts.attending_bytes,
        max_sweep_tokens=sweep_tokens,
        max_draft_rows=rows.guesses,
        max_sequences=fewer_sequences(facts, rows.sequences, slots),
        num_transit=num_transit,
        num_slots=slots,
    )


def _passing_experts(facts: ModelFacts, for_weights: int) -> int:
    """Experts that there is room for while they pass, before anything else stays: one at the least."""
    if not facts.experts:
        return 0
    slot_bytes = facts.slot_bytes_of_expert
    room = min(EXPERTS_BYTES, int(EXPERTS_SHARE * for_weights))
    return min(facts.num_experts, max(1, room // slot_bytes))


def _sweep_tokens(facts: ModelFacts, budget_bytes: int, floor: int) -> int:
    """The token budget of a sweep: the largest whose activations keep to their share, one row block at the least."""
    most = min(ACTIVATION_SHARE * budget_bytes, budget_bytes - floor)
    tokens = facts.sweep_tokens
    least = max(facts.chunk_tokens, facts.prompt_rows)
    while tokens > least and _activation_bytes(facts, tokens) > most:
        tokens = max(least, tokens // 2)
    return tokens


def _first_kv_bytes(facts: ModelFacts, budget_bytes: int) -> int:
    """KV that comes before anything else that would be faster in memory."""
    wanted = min(WANTED_KV_TOKENS, facts.context_length) * facts.kv_cost_bytes
    return int(min(wanted, WANTED_KV_SHARE * budget_bytes))


def _wanted_kv_bytes(facts: ModelFacts, budget_bytes: int) -> int:
    return max(_first_kv_bytes(facts, budget_bytes), int(MORE_KV_SHARE * budget_bytes))


def _most_kv_bytes(facts: ModelFacts) -> int:
    return MAX_KV_SEQUENCES * facts.context_length * facts.kv_cost_bytes


def _unit_limit(facts: ModelFacts, for_weights: int) -> int:
    """The largest unit that leaves the ring within its share: a whole layer, or less."""
    largest_layer = max(node.total_bytes for node in facts.streamed_body)
    if RING_UNITS * largest_layer <= RING_SHARE * for_weights:
        return largest_layer
    return max(FINEST_UNIT_BYTES, int(RING_SHARE * for_weights / RING_UNITS))


def _cut_all(facts: ModelFacts, limit: int) -> tuple[tuple[PlannedUnit, ...], tuple[PlannedUnit, ...]]:
    body = tuple(unit for node in facts.streamed_body for unit in cut_units(node, limit))
    if not facts.head.total_bytes:
        return body, ()
    return body, tuple(slice_rows(facts.head, min(limit, HEAD_SLICE_BYTES)))


def _floor_bytes(facts: ModelFacts) -> int:
    """What runs at all beside the activations: finest units, a ring for two of them, KV for two chunks, and states of
    one sequence."""
    body, head = _cut_all(facts, FINEST_UNIT_BYTES)
    units = body + head
    pinned = sum(unit.compute_bytes for unit in units if unit.pinned)
    experts = facts.slot_bytes_of_expert + facts.expert_scratch_bytes
    kept = _least_kv_bytes(facts) + least_state_bytes(facts)
    return _scratch_bytes(units) + pinned + kept + 2 * largest_unit(units) + experts


def _too_small(facts: ModelFacts, budget_bytes: int, least: int) -> BudgetTooSmall:
    body, head = _cut_all(facts, FINEST_UNIT_BYTES)
    largest = max(body + head, key=lambda unit: unit.ring_bytes)
    experts = f", and an expert {format_size(facts.experts[0].expert_bytes)}" if facts.experts else ""
    states = f"; a sequence needs two states of {format_size(facts.state_bytes)}" if facts.state_bytes else ""
    message = (
        f"a memory budget of {format_size(budget_bytes)} is too small: this model needs at least {format_size(least)} "
        f"(its largest unit that cannot be cut, {largest.name}, has {format_size(largest.num_bytes)}{experts}{states}"
        f"); pass memory={format_size(least, exact=True)!r} or more"
    )
    return BudgetTooSmall(message, budget_bytes=budget_bytes, required_bytes=least)


def _scratch_bytes(units: tuple[PlannedUnit, ...]) -> int:
    """Room for one unit converted to the compute dtype, or decoded, where it is stored otherwise."""
    return max((unit.scratch_bytes for unit in units), default=0)


def _num_pages(facts: ModelFacts, kv_bytes: int) -> int:
    """Pages that *kv_bytes* hold; where a token keeps no KV, they are accounts alone, as many as there may be."""
    page_bytes = facts.shared_tokens * facts.kv_cost_bytes
    most = -(-facts.context_length // facts.shared_tokens) * MAX_KV_SEQUENCES
    most = min(most, facts.kv_tokens // facts.shared_tokens)
    return max(_least_pages(facts), _most(most, kv_bytes, page_bytes))


def _num_transit(facts: ModelFacts, num_bytes: int, num_pages: int) -> int:
    """Pages that *num_bytes* let stream, at most those of a whole context; none if *num_pages* hold longer prompts."""
    if not facts.can_spill or not facts.slot_bytes:
        return 0
    fitting = min(-(-facts.context_length // facts.shared_tokens), num_bytes // facts.slot_bytes)
    return fitting if fitting >= num_pages else 0


def _least_kv_bytes(facts: ModelFacts) -> int:
    """KV of two chunks at the least."""
    return _least_pages(facts) * facts.shared_tokens * facts.kv_cost_bytes


def _least_pages(facts: ModelFacts) -> int:
    return max(2, 2 * facts.chunk_tokens // facts.shared_tokens, MIN_KV_TOKENS // facts.shared_tokens)


def _activation_bytes(facts: ModelFacts, sweep_tokens: int) -> int:
    """What a sweep of *sweep_tokens* computes with, at most.

    Packed rows are there three times (in, out, embedding rows); one row block, or all of them where Linears stream one
    by one, has its MLP's gate, up and product or its attention's projections. Logits are there once of every row that
    is sampled, of the least that there may be, once more of a row block, and one row is being sampled. Rows of a
    recurrent layer are there before and after its scans, which take a chunk at a time, in fp32, and copies of a state.
    """
    block_rows = max(facts.chunk_tokens, facts.prompt_rows)
    rows = sweep_tokens + block_rows + max(facts.streaming_rows, facts.resident_rows)
    width = facts.hidden_copies * facts.hidden_size
    packed = 3 * rows * width * facts.itemsize + rows * facts.layer_row_bytes
    block = block_rows * (4 * facts.intermediate_size + 8 * width) * facts.itemsize
    if facts.experts:  # what they are given for all rows, what they gave, and what was computed before its turn
        times = 4 if facts.is_on_device else 3  # there also what the processor is given
        packed += times * rows * facts.hidden_size * facts.itemsize
    scans = facts.chunk_tokens * facts.scan_row_bytes
    block = max(block, block_rows * facts.scanned_row_bytes + scans)
    if facts.is_cut:
        wide = max(3 * facts.intermediate_size, 8 * facts.hidden_size) * facts.itemsize
        block = max(block, rows * wide, rows * facts.scanned_row_bytes + scans)
    logits = facts.vocab_size * ((LEAST_SEQUENCES + STREAMING_ROWS) * facts.itemsize + SAMPLING_BYTES)
    return packed + block + logits + facts.state_scratch_bytes + facts.workspace_bytes


@dataclass(frozen=True, slots=True)
class _SampledRows:
    """Rows that a sweep may sample from.

    Attributes:
        sequences: that may run at once.
        guesses: that may be verified beside their newest tokens.
        num_bytes: what more than the least of them take.
    """

    sequences: int
    guesses: int
    num_bytes: int

    @classmethod
    def of(cls, facts: ModelFacts, budget_bytes: int, spare: int) -> _SampledRows:
        """As many as have room in their shares of the budget, and in *spare* bytes; guesses first."""
        row_bytes = facts.vocab_size * facts.itemsize
        kept_bytes = facts.kv_token_bytes + facts.state_row_bytes  # until it is accepted
        guess_bytes = 3 * facts.hidden_size * facts.itemsize + row_bytes + kept_bytes
        guesses = _most(MAX_DRAFT_ROWS, min(DRAFT_SHARE * budget_bytes, spare), guess_bytes)
        spare -= guesses * guess_bytes
        most = min(MAX_SEQUENCES, facts.sweep_tokens) - LEAST_SEQUENCES
        more = _most(most, min(SEQUENCES_SHARE * budget_bytes, spare), row_bytes)
        return cls(LEAST_SEQUENCES + more, guesses, guesses * guess_bytes + more * row_bytes)


def _most(count: int, num_bytes: float, each: int) -> int:
    """At most *count* things of *each* bytes that have room in *num_bytes*."""
    return min(count, int(max(0, num_bytes)) // each) if each else count

"""How fast a plan will be: pure arithmetic over rates.

A sweep takes the longest of what it reads from disk, what crosses the link to the device, and what it computes; all
three go on at once (design: "the economics"). A row block computes with every weight; quantised weights that no kernel
multiplies by are decoded once for all row blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from layerstream.planner.experts import num_wanted
from layerstream.planner.plan import Plan
from layerstream.planner.rates import Rates
from layerstream.planner.states import SLOTS_OF_SEQUENCE
from layerstream.planner.units import PlannedUnit, WeightNode, linears

TOKENS_PER_SWEEP = 2.7  # accepted, guesses from the context alone: measured on held-out questions (benchmarks/drafting)
ANSWER_TOKENS = 64
ANSWER_SLOTS = SLOTS_OF_SEQUENCE + 1  # its own, and the snapshot of the context
CONTEXT_TOKENS = 1000
VALUES_OF_MLP = 1  # activations per row and layer: gate and up become their product
EXPERT_CALL_ROWS = 16  # as many rows an expert computes at a time
VALUES_OF_HIDDEN = 8  # norms, rotations, attention, sums


@dataclass(frozen=True, slots=True)
class _Block:
    """A row block; kernels for quantised weights multiply the *used* rows alone."""

    rows: int
    used: int


@dataclass(frozen=True)
class Forecast:
    """What *plan* takes on a machine with *rates*.

    Attributes:
        context_tokens: of the prompt whose first token is waited for.
        dtype: that is computed in.
    """

    plan: Plan
    rates: Rates
    dtype: str
    context_tokens: int = CONTEXT_TOKENS

    @property
    def read_seconds(self) -> float:
        """What a sweep of one row reads from disk."""
        return self._read_seconds(1)

    @property
    def copy_seconds(self) -> float:
        """What crosses the link in a sweep."""
        return self.plan.link_bytes / self.rates.link if self.rates.link else 0.0

    @cached_property
    def decode_seconds(self) -> float:
        """Computing one row block of decode rows."""
        return self._compute_seconds([_Block(self.plan.decode_rows, 1)], 1)

    @cached_property
    def sweep_seconds(self) -> float:
        """A sweep that decodes one sequence."""
        return self._longest(self.decode_seconds, 1)

    @property
    def bound_by(self) -> str:
        """What a sweep waits for: ``"disk"``, ``"link"`` or ``"compute"``."""
        taken = {"disk": self.read_seconds, "link": self.copy_seconds, "compute": self.decode_seconds}
        return max(taken, key=lambda name: taken[name])

    @cached_property
    def free_tokens(self) -> int:
        """N*: prompt tokens whose compute hides behind the bytes of a sweep; 0 where nothing streams."""
        moved = max(self.read_seconds, self.copy_seconds)
        rows = max(self.plan.prompt_rows, self.plan.chunk_tokens)
        block = self._compute_seconds([_Block(rows, rows)], 0)
        return int(rows * moved / block) if block else 0

    @cached_property
    def cold_seconds(self) -> float:
        """From the question to the first token, nothing stored."""
        left, seconds = self.context_tokens, list[float]()
        while left > 0:
            tokens = min(left, self.plan.max_sweep_tokens)
            left -= tokens
            compute = self._compute_seconds(self._prompt_blocks(tokens), 1 if left <= 0 else 0)
            seconds.append(self._longest(compute, tokens))
        return math.fsum(seconds)

    @cached_property
    def warm_seconds(self) -> float:
        """The same with the context's KV stored, and a snapshot of its states; the question is a chunk of its own."""
        facts = self.plan.facts
        stored = (self.context_tokens * facts.kv_token_bytes + facts.state_bytes) / self.rates.disk
        tokens = self.plan.chunk_tokens
        compute = self._compute_seconds(self._prompt_blocks(tokens), 1)
        return max(self._longest(compute, tokens), self._read_seconds(tokens) + stored)

    @property
    def tokens_per_second(self) -> float:
        """Of one answer."""
        return TOKENS_PER_SWEEP / self.sweep_seconds

    @property
    def answer_seconds(self) -> float:
        """A question about a stored context, answered."""
        return self.warm_seconds + (ANSWER_TOKENS - 1) / self.tokens_per_second

    @property
    def kv_bytes_per_thousand(self) -> int:
        """KV of 1,000 tokens, in memory and in the store."""
        return 1000 * self.plan.facts.kv_token_bytes

    @property
    def process_bytes(self) -> int:
        """What the whole process takes of the host's memory, at most."""
        host = self.plan.host
        return self.rates.process_bytes + (self.plan.planned_bytes if host is None else host.planned_bytes)

    @property
    def used_bytes(self) -> int:
        """What it takes of that to answer a question about the context: where nothing streams, room for KV and states
        is taken as it fills; where weights do, all of it is taken at the start."""
        plan = self.plan
        if plan.streams:
            return self.process_bytes
        pages = -(-(self.context_tokens + ANSWER_TOKENS) // plan.page_tokens)
        place_bytes = plan.facts.kv_token_bytes if plan.host is not None else plan.facts.kv_place_bytes
        unused = max(0, plan.num_pages - pages) * plan.page_tokens * place_bytes
        if plan.host is None:
            unused += max(0, plan.num_slots - ANSWER_SLOTS) * plan.facts.state_bytes
        return self.process_bytes - unused

    @property
    def device_bytes(self) -> int | None:
        """What the whole process takes of the memory of all devices; ``None``: the processor computes."""
        libraries = self.rates.device_bytes * max(1, len(self.plan.parts))
        return None if self.plan.host is None else libraries + self.plan.planned_bytes

    def _compute_seconds(self, row_blocks: Sequence[_Block], num_sampled: int) -> float:
        """Computing a sweep of *row_blocks*, of which *num_sampled* rows, a few, go through the head."""
        plan = self.plan
        head_blocks = [_Block(plan.head_rows, num_sampled)] if num_sampled else []
        seconds = sum(self._unit_seconds(unit, row_blocks) for unit in plan.weights.body)
        seconds += sum(self._unit_seconds(unit, head_blocks) for unit in plan.weights.head)
        seconds += self._experts_seconds(sum(block.used for block in row_blocks))
        facts, rates = plan.facts, self.rates
        values = sum(block.rows for block in row_blocks) * (
            VALUES_OF_MLP * facts.intermediate_size + VALUES_OF_HIDDEN * facts.hidden_size
        )
        return seconds + facts.num_layers * (rates.layer_seconds * len(row_blocks) + rates.value_seconds * values)

    def _experts_seconds(self, num_rows: int) -> float:
        """Computing the experts that *num_rows* are routed to, where they come as they are routed to."""
        if not self.plan.weights.expert_slots:
            return 0.0
        rates, seconds = self.rates, 0.0
        for node in self.plan.facts.experts:
            wanted = num_wanted(node, num_rows)
            rows = num_rows * node.top_k / wanted
            if self.plan.facts.fused_rows.get(node.kernel, 0) >= EXPERT_CALL_ROWS:
                calls = max(1.0, rows / EXPERT_CALL_ROWS)
                of_call = rates.product_seconds(node.kernel, min(EXPERT_CALL_ROWS, max(1, round(rows))))
                seconds += node.num_values * wanted * calls * of_call
                continue
            calls = max(wanted, num_rows * node.top_k / EXPERT_CALL_ROWS)
            product = rates.product_seconds(self.dtype, EXPERT_CALL_ROWS, cached=bool(node.codec))
            decode = rates.decode_seconds(node.codec) if node.codec else 0.0
            seconds += node.num_values * (wanted * decode + calls * product)
        return seconds

    def unit_seconds(self, unit: PlannedUnit) -> float:
        """Computing one decode row block with *unit*, and its share of what calling layers takes."""
        plan = self.plan
        if unit in plan.weights.head:
            return self._unit_seconds(unit, [_Block(plan.head_rows, 1)])
        calls = self.rates.layer_seconds * plan.facts.num_layers / len(plan.weights.body)
        return self._unit_seconds(unit, [_Block(plan.decode_rows, 1)]) + calls

    @cached_property
    def block_seconds(self) -> float:
        """Computing the experts of one block for one row."""
        return self._experts_seconds(1) / max(1, len(self.plan.facts.experts))

    @cached_property
    def block_read_seconds(self) -> float:
        """Reading those of them that are not there."""
        return self.plan.expert_read_bytes(1) / max(1, len(self.plan.facts.experts)) / self.rates.disk

    @cached_property
    def _nodes(self) -> dict[str, WeightNode]:
        """Quantised Linears by name."""
        return {n.name: n for root in (*self.plan.facts.body, self.plan.facts.head) for n in linears(root)}

    def _unit_seconds(self, unit: PlannedUnit, row_blocks: Sequence[_Block]) -> float:
        if not row_blocks:
            return 0.0
        rates, facts, node = self.rates, self.plan.facts, self._nodes.get(unit.module)
        if node is None or unit.stays_decoded:
            num_values = unit.compute_bytes / facts.itemsize
            return num_values * sum(rates.product_seconds(self.dtype, block.rows) for block in row_blocks)
        first, last = unit.rows or (0, node.num_rows)
        num_values = node.value_bytes / facts.itemsize * (last - first) / node.num_rows
        most = facts.fused_rows.get(node.kernel, 0)
        fused = sum(rates.product_seconds(node.kernel, block.used) for block in row_blocks if block.rows <= most)
        decoded = [block.rows for block in row_blocks if block.rows > most]
        if decoded:
            fused += rates.decode_seconds(node.codec)
            fused += sum(rates.product_seconds(self.dtype, rows, cached=True) for rows in decoded)
        return num_values * fused

    def _prompt_blocks(self, num_tokens: int) -> list[_Block]:
        rows = self.plan.prompt_rows or self.plan.chunk_tokens
        return [_Block(rows, min(rows, num_tokens - at)) for at in range(0, num_tokens, rows)]

    def _read_seconds(self, num_rows: int) -> float:
        """What a sweep of *num_rows* reads from disk."""
        return (self.plan.weights.disk_bytes + self.plan.expert_read_bytes(num_rows)) / self.rates.disk

    def _longest(self, compute: float, num_rows: int) -> float:
        read = self._read_seconds(num_rows)
        return max(read, self.copy_seconds, compute + self.rates.read_cost * read)

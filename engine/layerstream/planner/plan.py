"""Where everything goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from layerstream.core.sizes import format_size
from layerstream.kv.device_rows import staged_rows
from layerstream.planner.experts import hit_rate, read_bytes
from layerstream.planner.facts import STREAMING_ROWS, ModelFacts
from layerstream.planner.units import UnitPlan


@dataclass(frozen=True, slots=True)
class HostPlan:
    """How host memory is spent for an accelerator.

    Attributes:
        resident_bytes: units that stay there and are copied for every sweep.
        ring_bytes: of the ring between disk and device; 0 if nothing comes from disk.
        kv_bytes: KV pages.
        workspace_bytes: what reading takes, and experts that the processor computes.
        expert_bytes: experts that come as they are routed to.
        free_bytes: what is free, where the budget is more than that.
    """

    budget_bytes: int
    resident_bytes: int
    ring_bytes: int
    kv_bytes: int
    workspace_bytes: int
    expert_bytes: int = 0
    free_bytes: int | None = None

    @property
    def planned_bytes(self) -> int:
        """What all parts take together, at most ``budget_bytes``."""
        return self.resident_bytes + self.ring_bytes + self.kv_bytes + self.workspace_bytes + self.expert_bytes


@dataclass(frozen=True, repr=False)
class Plan:
    """Where everything goes; ``print(plan)`` shows it.

    Attributes:
        weights: the units, and which of them are resident.
        embedding_resident: whether embedding rows come from memory.
        num_pages, page_tokens: KV pages, and the tokens that one of them holds: prompts share whole ones.
        num_transit: pages that may stream from the store for sequences that do not fit those.
        activation_bytes: what a sweep computes with, at most.
        max_draft_rows: guesses that a sweep may verify.
        max_sequences: sequences that may run at once: there is room for a row of logits of each, and for two states.
        num_slots: rooms for the states of all recurrent layers of a sequence; 0: there are no such layers.
        host: what is in host memory, where an accelerator computes.
        parts: where several accelerators compute, a plan for each, of its own layers alone.
        devices: then, the number of each part's device.
        layers: and, for each of the decoder's layers, its place among *parts*.
        free_bytes: what is free where it is for, if the budget is more than that.
        mtp: of the multi-token-prediction head, where it drafts; ``budget_bytes`` is without what it takes.
    """

    budget_bytes: int
    facts: ModelFacts
    weights: UnitPlan
    embedding_resident: bool
    num_pages: int
    page_tokens: int
    activation_bytes: int
    max_sweep_tokens: int
    max_draft_rows: int
    max_sequences: int
    num_transit: int = 0
    host: HostPlan | None = None
    parts: tuple[Plan, ...] = ()
    devices: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    free_bytes: int | None = None
    mtp: Plan | None = None
    num_slots: int = 0

    @property
    def streams(self) -> bool:
        """Whether any weight streams."""
        return self.weights.num_streamed > 0 or self.weights.expert_slots > 0

    @property
    def expert_hit_rate(self) -> float:
        """Of the experts that rows are routed to, the share that is in memory, as far as it is known."""
        return self.hit_rate(self.weights.expert_slots + self.weights.host_expert_slots)

    def hit_rate(self, num_slots: int) -> float:
        """Of the experts that rows are routed to, the share that *num_slots* hold, as far as it is known."""
        return hit_rate(num_slots, self.facts.num_experts, self.facts.expert_shares)

    def expert_read_bytes(self, num_rows: float) -> int:
        """Experts that a sweep of *num_rows* reads, on average; 0 where they do not come as they are routed to."""
        if not self.weights.expert_slots:
            return 0
        return round(read_bytes(self.facts.experts, num_rows, self.expert_hit_rate))

    def expert_link_bytes(self, num_rows: float) -> int:
        """Experts that a sweep of *num_rows* moves to where they are computed with, on average: from disk, or to a
        device those that it does not have (less, where the processor computes some of them)."""
        if not self.weights.expert_slots:
            return 0
        return round(read_bytes(self.facts.experts, num_rows, self.hit_rate(self.weights.expert_slots)))

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens that attend together, counted from position 0: some whole pages."""
        return self.facts.chunk_tokens

    @property
    def decode_rows(self) -> int:
        """Rows per row block of decoding sequences; no more than a kernel for quantised weights is fast for."""
        facts = self.facts
        return min([facts.streaming_rows if self.streams else facts.resident_rows, *facts.fused_rows.values()])

    @property
    def staged_rows(self) -> int:
        """Decode rows whose KV may be on its way from a device to the host, side by side."""
        return staged_rows(self.decode_rows, self.max_sequences + self.max_draft_rows)

    @property
    def head_rows(self) -> int:
        """Rows per row block of the head."""
        return min(STREAMING_ROWS, self.decode_rows)

    @property
    def prompt_rows(self) -> int:
        """Rows per row block of prompts; 0 where every chunk is a row block of its own size."""
        rows = self.facts.prompt_rows if self.streams else self.facts.resident_prompt_rows
        return max(rows, self.chunk_tokens) if rows else 0

    @property
    def max_sweep_rows(self) -> int:
        """Rows of one sweep at most: the last chunk may reach past the token budget, and guesses come on top."""
        return self.max_sweep_tokens + self.chunk_tokens + self.max_draft_rows

    @property
    def logit_bytes(self) -> int:
        """Logits of all rows that a sweep may sample from."""
        return (self.max_sequences + self.max_draft_rows) * self.facts.vocab_size * self.facts.itemsize

    @property
    def resident_bytes(self) -> int:
        """Weights that stay, in the compute dtype."""
        return self.weights.resident_bytes + (self.facts.embedding_bytes if self.embedding_resident else 0)

    @property
    def streamed_bytes(self) -> int:
        """Weights that one sampling sweep moves to where they are computed with: from disk, or to a device. Of experts
        those of one row."""
        return self.weights.streamed_bytes + self.expert_link_bytes(1)

    @property
    def by_device(self) -> tuple[Plan, ...]:
        """A plan for each device: this one, where there is one."""
        return self.parts or (self,)

    @property
    def takes_turns(self) -> bool:
        """Whether several devices take turns, so that all links bring weights at once, or come one after the other."""
        return sum(a != b for a, b in pairwise(self.layers)) >= len(self.parts) > 1

    @property
    def link_bytes(self) -> int:
        """Of ``streamed_bytes``, those that cross links to devices one after the other. Devices that do not take turns
        have their rings filled while others compute."""
        busiest = max((part.streamed_bytes for part in self.parts), default=self.streamed_bytes)
        if self.takes_turns or not self.parts:
            return busiest
        return max(busiest, self.streamed_bytes - sum(part.weights.ring_bytes for part in self.parts))

    @property
    def disk_bytes(self) -> int:
        """Weights that one sampling sweep reads from disk; of experts those of one row."""
        return self.weights.disk_bytes + self.expert_read_bytes(1)

    @property
    def bits_per_weight(self) -> float:
        """Of what a sweep passes, on disk, scales and norms included; 0.0 if it is not known how many there are."""
        return 8 * self.facts.stored_bytes / self.facts.num_values if self.facts.num_values else 0.0

    @property
    def kv_bytes(self) -> int:
        """Room for KV pages."""
        if self.parts:
            return sum(part.kv_bytes for part in self.parts)
        return self.num_pages * self.page_tokens * self.facts.kv_place_bytes

    @property
    def state_bytes(self) -> int:
        """Room for states of recurrent layers."""
        return self.num_slots * self.facts.state_bytes

    @property
    def transit_bytes(self) -> int:
        """Room for KV that streams past."""
        return self.num_transit * self.facts.slot_bytes

    @property
    def planned_bytes(self) -> int:
        """What all parts take together, at most ``budget_bytes``."""
        weights = self.resident_bytes + self.weights.ring_bytes + self.weights.expert_bytes
        return weights + self.kv_bytes + self.transit_bytes + self.state_bytes + self.activation_bytes

    def __repr__(self) -> str:
        streams = f"streams {format_size(self.streamed_bytes)} a sweep" if self.streams else "streams nothing"
        tokens = self.num_pages * self.page_tokens
        return f"<Plan: {format_size(self.budget_bytes)}, {streams}, KV for {tokens:,} tokens; print() shows all of it>"

    def __str__(self) -> str:
        rows = [f"{name:<20}{format_size(num_bytes):>11}  {note}" for name, num_bytes, note in self._rows()]
        if self.facts.wanted_context:
            wanted = f"the model's limit; {self.facts.wanted_context:,} were asked for"
            rows.append(f"{'context':<20}{self.facts.context_length:>11,}  {wanted}")
        return "\n".join(row.rstrip() for row in rows)

    def _rows(self) -> Iterator[tuple[str, int, str]]:
        host = self.host
        if self.parts:
            for index, (device, part) in enumerate(zip(self.devices, self.parts, strict=True)):
                count = self.layers.count(index)
                yield f"memory of device {device}", part.budget_bytes, f"{count} of {len(self.layers)} layers"
                yield from part._own_rows()
        else:
            note = _too_much(self.free_bytes) or "of the device" * (host is not None)
            beside = 0 if self.mtp is None else self.mtp.planned_bytes
            yield "memory" if host else "budget", self.budget_bytes + beside, note
            yield from self._own_rows()
        if host is not None:
            yield from self._host_rows(host)
        bits = f"{self.bits_per_weight:.3g} bits each, without the embedding"
        yield "weights on disk", self.facts.stored_bytes, bits
        if host is not None:
            yield (
                "copied per sweep",
                self.streamed_bytes,
                "to devices, which take turns" if self.takes_turns else "from host to device",
            )
        yield "read per sweep", self.disk_bytes, "from disk"

    def _own_rows(self) -> Iterator[tuple[str, int, str]]:
        """How the budget is spent."""
        weights = self.weights
        tokens = f"{self.num_pages * self.page_tokens:,} tokens"
        yield "resident weights", self.resident_bytes, f"{len(weights.residents)} of {len(weights.units)} units"
        yield "ring", weights.ring_bytes, f"{weights.num_streamed} units pass through it"
        if weights.expert_slots:
            note = f"{weights.expert_slots:,} of {self.facts.num_experts:,}, those that are used most"
            yield "experts", weights.expert_bytes, note
        yield "KV pages", self.kv_bytes, f"{tokens}, of the layers in hand" if self.facts.kv_rides else tokens
        if self.num_transit:
            extra = f"{self.num_transit * self.page_tokens:,} tokens more, from the store"
            yield "KV in transit", self.transit_bytes, extra
        if self.state_bytes:
            each = format_size(self.facts.state_bytes)
            yield "states", self.state_bytes, f"{self.num_slots} slots of {each}, two for each answer"
        rows = f"{self.max_sweep_tokens} tokens, {self.max_sequences} answers, {self.max_draft_rows} guesses in a sweep"
        yield "activations", self.activation_bytes, rows
        if self.mtp is not None:
            streams = f", streams {format_size(self.mtp.streamed_bytes)} for a guess" if self.mtp.streams else ""
            yield "prediction head", self.mtp.planned_bytes, f"with its KV, for guesses{streams}"
        yield "left over", self.budget_bytes - self.planned_bytes, ""

    def _host_rows(self, host: HostPlan) -> Iterator[tuple[str, int, str]]:
        """How host memory is spent."""
        yield "host memory", host.budget_bytes, _too_much(host.free_bytes)
        staying = f"{len(self.weights.host_residents)} units, copied for every sweep"
        yield "resident weights", host.resident_bytes, staying
        yield "ring", host.ring_bytes, "between disk and device"
        if host.expert_bytes:
            slots, count = self.weights.host_expert_slots, self.facts.num_experts
            yield "experts", host.expert_bytes, f"{slots:,} of {count:,}, those that are used most after the device's"
        yield "KV pages", host.kv_bytes, f"{self.num_pages * self.page_tokens:,} tokens"


def _too_much(free_bytes: int | None) -> str:
    return "" if free_bytes is None else f"more than the {format_size(free_bytes)} that are free here"

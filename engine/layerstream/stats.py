"""What an engine has done so far, in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from layerstream.runtime.clients import ClientCounters, ClientStats
from layerstream.runtime.guard import Guard
from layerstream.runtime.loop import LoopCounters
from layerstream.scheduling.drafting.trees import DrafterCounters
from layerstream.setup.assembly import Assembly
from layerstream.store.counters import KVStats
from layerstream.store.store import PrefixStore
from layerstream.streaming.experts.bank import ExpertBank
from layerstream.streaming.experts.device_bank import AnyBank


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Experts that come as they are routed to.

    Attributes:
        num_experts: of all layers; *num_slots* of them are in memory at a time.
        hits, misses: wanted by a sweep and there, or read for it.
        streamed_bytes: what was read for that.
        device_slots: of the slots, those of an accelerator; ``device_hits``: of the hits, those there.
        host_computed: beside an accelerator, those that the processor computed.
    """

    num_experts: int
    num_slots: int
    hits: int
    misses: int
    streamed_bytes: int
    device_slots: int = 0
    device_hits: int = 0
    host_computed: int = 0

    @property
    def hit_rate(self) -> float:
        """Of those wanted, the share that was there; 0.0 before the first sweep."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class StateStats:
    """Slots for the states of recurrent layers.

    Attributes:
        num_slots: each of *slot_bytes*, the states of all such layers of one sequence.
        used_slots: of them, those that sequences, snapshots and what is being stored hold now.
        snapshots: states after prefixes, in memory.
    """

    num_slots: int
    slot_bytes: int
    used_slots: int
    snapshots: int


@dataclass(frozen=True, slots=True)
class ReuseStats:
    """What moving passages did (``reuse="anywhere"``).

    Attributes:
        is_blending: whether prompts are blended still; not, once too few answers agreed.
        blended_tokens: of prompts, those that were moved or shared with whoever moved them.
        blended_answers: greedy ones; *compared_answers* of them were asked again exactly, while nothing else was to do.
        agreement: share of those compared of late that were the same; ``None``: none was compared.
    """

    is_blending: bool
    blended_tokens: int
    blended_answers: int
    compared_answers: int
    agreement: float | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started.

    Attributes:
        weight_bytes_streamed: brought to where they are computed with by sweeps, from disk or from host memory;
            resident weights, brought once, are not in it.
        peak_memory_bytes: the most that was measured of what ``budget_bytes`` is for. Where an accelerator computes,
            what torch reserved of its memory. On the processor, memory of the process that no file is behind, over what
            it had when the model's code and tokenizer were loaded and no weight yet; looked at before and after every
            sweep, so what else the process allocates meanwhile is in it (and what the grammar library keeps of the
            tokenizer from the first ``response_format`` on), and a peak within a sweep may not be. Elsewhere than on
            Linux: all that is resident.
        planned_memory_bytes: what the plan says about the same: resident weights, ring, KV pages that were in use at a
            time, slots for states, activations.
        wait_seconds: of ``sweep_seconds``, how long the compute waited for weights.
        bytes_per_sweep: weights that a sweep brings; ``bits_per_weight``: of what it passes, as it is stored.
        kv: what the prefix cache did.
        read_modes: files per way of reading ("direct", "uncached", "buffered").
        drafted_tokens, accepted_tokens: guesses that were verified, and those that were right; ``drafters`` by whom.
        declined_drafts: sweeps whose guesses were not all worth the time, or the experts, that they would have taken.
        forced_tokens: tokens that a grammar left no choice about; they took no sweep.
        experts: what came as it was routed to; ``None``: nothing does.
        states: slots for states of recurrent layers; ``None``: the model has no such layers.
        reuse: what moving passages did; ``None``: the engine was not asked to.
        advice: the one change to prompts that would let most of them be reused, once that is known; it was logged.
        clients: what was done for whom, of requests that are over: for the last thousand of those who asked.
    """

    sweeps: int
    tokens_in: int
    tokens_out: int
    weight_bytes_streamed: int
    sweep_seconds: float
    wait_seconds: float
    peak_memory_bytes: int
    planned_memory_bytes: int
    budget_bytes: int
    resident_bytes: int
    model_bytes: int
    bytes_per_sweep: int
    bits_per_weight: float
    read_modes: Mapping[str, int]
    kv: KVStats
    drafted_tokens: int
    accepted_tokens: int
    forced_tokens: int
    drafters: Mapping[str, DrafterCounters]
    declined_drafts: int = 0
    experts: ExpertStats | None = None
    states: StateStats | None = None
    reuse: ReuseStats | None = None
    advice: str = ""
    clients: Mapping[str, ClientStats] = field(default_factory=dict[str, ClientStats])


def collect_stats(parts: Assembly, counters: LoopCounters, clients: ClientCounters, guard: Guard) -> EngineStats:
    """The numbers of an engine's *parts*, of its loop, of its *clients*, and of its *guard*."""
    pool, plan = parts.scheduler.pool, parts.plan
    used_kv = pool.peak_used * pool.page_tokens * plan.facts.kv_token_bytes + plan.transit_bytes
    fixed = plan.resident_bytes + plan.weights.ring_bytes + plan.weights.expert_bytes + plan.activation_bytes
    fixed += plan.state_bytes
    streamer = parts.weights.streamer
    beside = [parts.draft.plan if parts.draft else None, plan.mtp]
    planned = fixed + used_kv + sum(other.planned_bytes for other in beside if other is not None)
    return EngineStats(
        sweeps=counters.sweeps,
        tokens_in=counters.tokens_in,
        tokens_out=counters.tokens_out,
        weight_bytes_streamed=streamer.streamed_bytes if streamer else 0,
        sweep_seconds=counters.sweep_seconds,
        wait_seconds=streamer.wait_seconds if streamer else 0.0,
        peak_memory_bytes=_measured(parts),
        planned_memory_bytes=planned,
        budget_bytes=plan.budget_bytes,
        resident_bytes=plan.resident_bytes,
        model_bytes=parts.skeleton.model_bytes,
        bytes_per_sweep=plan.streamed_bytes,
        bits_per_weight=plan.bits_per_weight,
        read_modes={str(mode): count for mode, count in parts.reader.stats.modes.items()},
        kv=_kv_stats(parts.store, counters),
        drafted_tokens=counters.drafted_tokens,
        accepted_tokens=counters.accepted_tokens,
        forced_tokens=counters.forced_tokens,
        advice=counters.advice,
        drafters={name: dataclasses.replace(counted) for name, counted in parts.drafting.counters.items()},
        declined_drafts=parts.drafting.num_declined,
        experts=_expert_stats(parts),
        states=_state_stats(parts),
        clients=clients.snapshot(),
        reuse=_reuse_stats(parts, counters, guard),
    )


def _reuse_stats(parts: Assembly, counters: LoopCounters, guard: Guard) -> ReuseStats | None:
    if parts.config.reuse == "exact":
        return None
    return ReuseStats(
        is_blending=guard.is_blending,
        blended_tokens=counters.blended_tokens,
        blended_answers=guard.num_blended,
        compared_answers=guard.num_compared,
        agreement=guard.agreement,
    )


def _state_stats(parts: Assembly) -> StateStats | None:
    states, plan = parts.scheduler.states, parts.plan
    if not states.is_needed:
        return None
    return StateStats(plan.num_slots, plan.facts.state_bytes, states.pool.num_used, states.num_snapshots)


def _measured(parts: Assembly) -> int:
    if parts.devices:
        return sum(device.peak_bytes() for device in parts.devices)
    return parts.step.footprint.peak_bytes


def _expert_stats(parts: Assembly) -> ExpertStats | None:
    """Of all banks together: one for each device."""
    found = [_bank_stats(bank) for bank in parts.weights.banks]
    if not found:
        return None
    values = zip(*(dataclasses.astuple(each) for each in found), strict=True)
    return ExpertStats(*map(sum, values))


def _bank_stats(bank: AnyBank) -> ExpertStats:
    cache = bank.cache
    if isinstance(bank, ExpertBank):
        return ExpertStats(cache.num_experts, cache.num_slots, cache.hits, cache.misses, bank.streamed_bytes)
    behind = bank.host.cache
    return ExpertStats(
        num_experts=cache.num_experts,
        num_slots=min(cache.num_experts, cache.num_slots + behind.num_slots),
        hits=cache.hits + behind.hits,
        misses=behind.misses,
        streamed_bytes=bank.host.streamed_bytes,
        device_slots=cache.num_slots,
        device_hits=cache.hits,
        host_computed=bank.num_computed_on_host,
    )


def _kv_stats(store: PrefixStore | None, counters: LoopCounters) -> KVStats:
    if store is None:
        return KVStats(hits=counters.prefix_hits, reused_tokens=counters.reused_tokens)
    counted, snapshots = dataclasses.asdict(store.counters), store.state_loader.counters
    return KVStats(
        state=store.state,
        reason=store.reason,
        hits=counters.prefix_hits,
        reused_tokens=counters.reused_tokens,
        loaded_bytes=store.loader.counters.num_bytes + snapshots.num_bytes,
        loaded_snapshots=snapshots.pages,
        loaded_snapshot_bytes=snapshots.num_bytes,
        recomputed_tokens=counted.pop("declined_tokens"),
        **counted,
    )

"""The parts of an engine, each made by one function from what it needs of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from layerstream.api.events import Listener, LoadProgress
from layerstream.hardware.footprint import Footprint
from layerstream.hardware.reader import ASSUMED_READ_RATE, DirectReader
from layerstream.kv.on_device import DeviceKV
from layerstream.kv.pages import PagePool
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.state import LayerState, PageMemory, Transit
from layerstream.kv.swap import PageSwap
from layerstream.model.blending import Blender
from layerstream.model.embedding import EmbeddingRows
from layerstream.model.expert_usage import ExpertUsage
from layerstream.model.graphs import Graphs
from layerstream.model.leaving import let_rows_leave
from layerstream.model.linear import SlicedLinear
from layerstream.model.model_weights import ModelWeights
from layerstream.model.runner import Loaders, SweepRunner
from layerstream.planner import Plan
from layerstream.runtime.step import SweepStep
from layerstream.runtime.steward import Steward
from layerstream.scheduling.blending import Recompute
from layerstream.scheduling.drafting.answers import AnswerDrafter
from layerstream.scheduling.drafting.base import Drafter
from layerstream.scheduling.drafting.suffix import SuffixDrafter
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler
from layerstream.scheduling.states import snapshot_stride
from layerstream.setup.closing import Closing
from layerstream.setup.groundwork import Groundwork, look_at_source
from layerstream.setup.known_rates import correct
from layerstream.setup.open_store import HOPED_READ_RATE, open_store, weight_paths
from layerstream.store.popularity import Popularity
from layerstream.store.store import PrefixStore
from layerstream.streaming.experts.device_bank import AnyBank


@dataclass(frozen=True, slots=True)
class KVParts:
    """The KV of an engine, and the states of its recurrent layers: in memory, where they go when it is short, and where
    they outlive the process."""

    memory: PageMemory
    states: list[LayerState]
    recurrent: list[RecurrentLayer]
    swap: PageSwap
    state_swap: PageSwap
    store: PrefixStore | None
    popularity: Popularity


def make_kv(ground: Groundwork, closing: Closing) -> KVParts:
    """Its memory is touched in the background where it surely is used.

    Raises:
        KVStoreUnusable: as :func:`open_store` says.
    """
    plan = ground.plan
    kv_bytes = plan.kv_bytes if plan.host is None else plan.host.kv_bytes
    memory = closing.keep(PageMemory(kv_bytes, ground.devices[0] if ground.devices else None))
    traced = ground.skeleton.trace
    transit = Transit(plan.num_transit, plan.page_tokens, traced.lasting)
    states = [
        LayerState(plan.num_pages, plan.page_tokens, memory, number, transit) for number in range(len(traced.keepers))
    ]
    recurrent = _make_slots(ground)
    store = _make_store(ground, states, recurrent)
    if store is not None:
        closing.keep(store)
    if plan.streams:  # then all of it was counted for KV; else it may be much more than is ever used
        memory.populate()
    swap, state_swap = closing.keep(PageSwap(states)), closing.keep(PageSwap(recurrent))
    config = ground.config.kv_store
    popularity = Popularity(store, "" if config is None else config.salt)
    return KVParts(memory, states, recurrent, swap, state_swap, store, popularity)


def load_weights(ground: Groundwork, listener: Listener | None) -> ModelWeights:
    """What stays is there then; what streams comes from the first sweep on."""
    plan = ground.plan
    on_load = _LoadCounter(_loaded_bytes(plan), listener).add
    return ModelWeights(ground.skeleton, plan, ground.reader, on_load, ground.placement)


def load_embedding(ground: Groundwork, weights: ModelWeights) -> EmbeddingRows:
    """Rows of the embedding: of a matrix that is there, or from disk."""
    skeleton, plan, reader = ground.skeleton, ground.plan, ground.reader
    resident: torch.Tensor | None = None
    if skeleton.is_tied:
        resident = weights.resident_matrix(skeleton.head_key)
    elif plan.embedding_resident:
        resident = weights.load_matrix(skeleton.embedding_key, reader)
    source = skeleton.sources[skeleton.embedding_key]
    return EmbeddingRows(source, skeleton.dtype, reader, max_rows=plan.max_sweep_rows, resident=resident)


def load_layer_embedding(ground: Groundwork) -> EmbeddingRows | None:
    """Rows that go to each layer, from disk; ``None``: the model has no such table."""
    skeleton = ground.skeleton
    if (key := skeleton.layer_embedding_key) is None:
        return None
    return EmbeddingRows(skeleton.sources[key], skeleton.dtype, ground.reader, max_rows=ground.plan.max_sweep_rows)


def begin_reading(ground: Groundwork, weights: ModelWeights) -> None:
    """Loading is over: how fast it was is looked at, and what the first sweep needs is on its way."""
    look_at_source(weight_paths(ground.skeleton), ground.plan, ground.reader.rate())
    ground.reader.restart_rate()
    if weights.streamer is not None:
        weights.streamer.read_ahead()


def sweep_limits(ground: Groundwork) -> SweepLimits:
    """What shapes the sweeps of the plan."""
    plan = ground.plan
    return SweepLimits(
        max_tokens=plan.max_sweep_tokens,
        chunk_tokens=plan.chunk_tokens,
        decode_rows=plan.decode_rows,
        prompt_rows=plan.prompt_rows,
        one_sequence_per_block=ground.skeleton.trace.is_alone,
        max_draft_rows=plan.max_draft_rows,
        max_sequences=plan.max_sequences,
    )


def make_steward(ground: Groundwork, kv: KVParts, experts: Sequence[AnyBank]) -> Steward:
    """With a scheduler within the plan's limits."""
    plan, reader, limits = ground.plan, ground.reader, sweep_limits(ground)
    num_transit = plan.num_transit if kv.store is not None else 0
    pool = PagePool(plan.num_pages, plan.page_tokens, num_transit)
    load = _ExpertLoad(experts, plan.facts.mean_expert_bytes, reader) if experts else None
    scheduler = Scheduler(
        limits,
        pool,
        kv.store,
        lambda: ground.moving_seconds(rows=0),
        can_swap=True,
        experts=load,
        num_slots=plan.num_slots,
        stride=snapshot_stride(plan.facts.state_bytes, plan.facts.kv_token_bytes, plan.page_tokens),
        recompute=_recompute(ground),
    )
    return Steward(scheduler, kv.swap, kv.state_swap, kv.store)


def make_step(
    ground: Groundwork, runner: SweepRunner, weights: ModelWeights, steward: Steward, seen: Footprint
) -> SweepStep:
    """What computes the sweeps that *steward* has, by *runner*."""
    plan, skeleton = ground.plan, ground.skeleton
    statistics = ExpertUsage(weight_paths(skeleton), skeleton.routed) if weights.banks else None
    learn = None if ground.devices else partial(correct, plan, str(skeleton.dtype).removeprefix("torch."))
    return SweepStep(steward, runner, weights, ground.devices, statistics, seen, learn)


def make_drafters(ground: Groundwork, store: PrefixStore | None, models: Sequence[Drafter]) -> list[Drafter]:
    """Those that guess from text alone, and *models*, which compute."""
    config = ground.config
    if config.speculation == "off":
        return []
    drafters: list[Drafter] = [SuffixDrafter()]
    if store is not None and config.kv_store is not None and config.kv_store.answers:
        drafters.append(AnswerDrafter(store))
    return [*drafters, *models]


def _make_slots(ground: Groundwork) -> list[RecurrentLayer]:
    """Where each recurrent layer is computed."""
    layers, placement = ground.skeleton.trace.layers, ground.placement
    found = []
    for number in ground.skeleton.trace.recurrent:
        recurrent = layers[number].recurrent
        assert recurrent is not None
        device = None if placement is None else placement.of(number)
        found.append(RecurrentLayer(recurrent.shape, ground.plan.num_slots, device))
    return found


def _make_store(ground: Groundwork, states: list[LayerState], recurrent: list[RecurrentLayer]) -> PrefixStore | None:
    config = ground.config
    if config.kv_store is None:
        return None
    return open_store(
        config.kv_store,
        is_default=config.kv_store_is_default,
        model=config.model,
        folder=ground.folder,
        skeleton=ground.skeleton,
        plan=ground.plan,
        states=states,
        recurrent=recurrent,
        reader=ground.reader,
        computes=ground.computes,
        sweep_seconds=lambda: ground.moving_seconds(HOPED_READ_RATE),
    )


def make_runner(
    ground: Groundwork,
    kv: KVParts,
    weights: ModelWeights,
    closing: Closing,
    embedding: EmbeddingRows | None = None,
    head: SlicedLinear | None = None,
) -> SweepRunner:
    """What runs the model; with another's *embedding* and *head* where they are given: its rows are in no chunks."""
    plan, placement = ground.plan, ground.placement
    device_kv = None
    if placement is not None and kv.states:
        rides = [part.facts.kv_rides for part in plan.by_device]
        traced = ground.skeleton.trace
        kept = [traced.layers[layer].kept for layer in traced.keepers]
        device_kv = DeviceKV(
            placement,
            traced.keepers,
            kv.states,
            [shape for shape in kept if shape is not None],
            [layer.sight for layer in traced.layers if layer.state >= 0 and not layer.expands],
            plan.num_pages,
            plan.page_tokens,
            rides,
            traced.lasting,
            plan.staged_rows,
        )
        closing.keep(device_kv)
    blender = None
    if ground.config.reuse == "anywhere":
        trace, modules = ground.skeleton.trace, dict(ground.skeleton.model.named_modules())
        blender = Blender(trace, modules)
        let_rows_leave([modules[path] for path in trace.paths], trace.keepers[blender.compared])
    graphs = None
    if device_kv is not None and _follows_from_shapes(ground, weights):
        graphs = Graphs(ground.devices[0], device_kv)
    return SweepRunner(
        ground.skeleton,
        weights,
        embedding or load_embedding(ground, weights),
        load_layer_embedding(ground),
        kv.states,
        kv.recurrent,
        plan.head_rows,
        None if kv.store is None else Loaders(kv.store.loader, kv.store.state_loader),
        placement,
        device_kv,
        ground.prefers_flash,
        head,
        graphs,
        blender,
        plan.chunk_tokens if embedding is None else 0,
    )


def _recompute(ground: Groundwork) -> Recompute:
    """How much of what is moved is computed again. Where a row block has rows of one sequence in one piece, rows that
    are chosen one by one would be a block each."""
    share = None if isinstance(ground.config.recompute, str) else ground.config.recompute
    by_deviation = ground.config.recompute_by == "deviation" and not ground.skeleton.trace.is_alone
    return Recompute(share, by_deviation=by_deviation)


def _follows_from_shapes(ground: Groundwork, weights: ModelWeights) -> bool:
    """Whether what a sweep launches may be the same every time, and may be asked for at once: all is on one device, and
    no layer runs for one sequence at a time."""
    trace = ground.skeleton.trace
    is_there = weights.streamer is None and len(ground.devices) == 1
    return ground.config.cuda_graphs and is_there and not trace.is_alone and not trace.recurrent


def _loaded_bytes(plan: Plan) -> int:
    """What is read before the first sweep."""
    loaded = plan.resident_bytes + plan.weights.expert_bytes
    return loaded if plan.host is None else loaded + plan.host.resident_bytes + plan.host.expert_bytes


class _ExpertLoad:
    """What the banks expect of rows, at the rates of disk and links; one waits for its experts after the other."""

    def __init__(self, banks: Sequence[AnyBank], expert_bytes: float, reader: DirectReader) -> None:
        self._banks = banks
        self._expert_bytes = expert_bytes
        self._reader = reader

    def wanted(self, num_rows: int) -> float:
        return sum(bank.expected(num_rows)[0] for bank in self._banks)

    def read_seconds(self, num_rows: int) -> float:
        rate = self._reader.rate() or ASSUMED_READ_RATE
        expected = [bank.expected(num_rows) for bank in self._banks]
        crossing = sum(count * bank.crossing_seconds for bank, (_, count, _) in zip(self._banks, expected, strict=True))
        return max(sum(count for _, _, count in expected) * self._expert_bytes / rate, crossing)


class _LoadCounter:
    """Turns finished reads into events."""

    def __init__(self, total_bytes: int, listener: Listener | None) -> None:
        self.done_bytes = 0
        self._total_bytes = total_bytes
        self._listener = listener

    def add(self, num_bytes: int) -> None:
        """*num_bytes* more are there (several reader threads; a lost update would only shake the bar)."""
        self.done_bytes += num_bytes
        if self._listener is not None:
            self._listener(LoadProgress(min(self.done_bytes, self._total_bytes), self._total_bytes))

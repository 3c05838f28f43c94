"""Puts an engine together from its configuration: skeleton, plan, weights, pages, scheduler."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerstream.api.events import Listener, LoadProgress, PackProgress
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError, KVStoreUnusable
from layerstream.hardware.accelerators import device_name, open_device
from layerstream.hardware.device import Device, Placement, names_of_layers
from layerstream.hardware.footprint import Footprint
from layerstream.hardware.machine import available_memory_bytes, network_file_system
from layerstream.hardware.reader import ASSUMED_READ_RATE, DirectReader
from layerstream.hardware.timeline import Timeline
from layerstream.kv.on_device import DeviceKV
from layerstream.kv.pages import PagePool
from layerstream.kv.state import LayerState, PageMemory, Transit
from layerstream.kv.swap import PageSwap
from layerstream.model.device_attention import resolve_attention
from layerstream.model.embedding import EmbeddingRows
from layerstream.model.expert_usage import ExpertUsage
from layerstream.model.families import ONE_SEQUENCE_PER_BLOCK
from layerstream.model.model_weights import ModelWeights
from layerstream.model.runner import SweepRunner
from layerstream.model.skeleton import Skeleton
from layerstream.planner import Plan
from layerstream.planner.rates import SLOW_DISK
from layerstream.runtime.draft_model import ModelDrafter
from layerstream.runtime.loop import LoopCounters
from layerstream.runtime.step import SweepStep
from layerstream.runtime.steward import Steward
from layerstream.scheduling.drafting.answers import AnswerDrafter
from layerstream.scheduling.drafting.base import Drafter
from layerstream.scheduling.drafting.suffix import SuffixDrafter
from layerstream.scheduling.drafting.trees import TreeDrafting
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler
from layerstream.setup.config import EngineConfig
from layerstream.setup.draft import check_same_tokens, draft_config
from layerstream.setup.known_rates import correct
from layerstream.setup.open_store import HOPED_READ_RATE, describe, open_store, weight_paths
from layerstream.setup.pack import ensure_packed
from layerstream.setup.plan_model import devices_of, locate_model, plan_model
from layerstream.store.config import KVStoreConfig
from layerstream.store.fingerprint import DigestMemory, WeightFiles, namespace
from layerstream.store.store import PrefixStore
from layerstream.streaming.experts.device_bank import AnyBank
from layerstream.streaming.experts.paths import ASSUMED_LINK_RATE
from layerstream.text.defaults import GenerationDefaults, load_defaults
from layerstream.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembly:
    """An engine's parts, before its thread starts. ``devices`` compute; none: the processor."""

    config: EngineConfig
    tokenizer: Any
    defaults: GenerationDefaults
    plan: Plan
    context_length: int
    model_bytes: int
    skeleton: Skeleton
    reader: DirectReader
    weights: ModelWeights
    scheduler: Scheduler
    step: SweepStep
    drafting: TreeDrafting
    store: PrefixStore | None
    swap: PageSwap
    draft: Assembly | None
    devices: tuple[Device, ...]
    page_memory: PageMemory

    def close(self) -> None:
        """Write what is to be stored, let go of all files, end all threads. Idempotent; what one part cannot do is
        logged, and the others do theirs."""
        parts = (self.step, self.draft, self.store, self.swap, self.weights, self.page_memory, self.reader)
        for part in parts:
            try:
                if part is not None:
                    part.close()
            except Exception:
                logger.exception("a %s could not be closed", type(part).__name__)

    def record(self, timeline: Timeline | None) -> None:
        """Have *timeline* told what goes on from here, between two sweeps; ``None``: no more."""
        self.reader.timeline = timeline
        self.weights.record(timeline)

    def seconds_per_sweep(self, counters: LoopCounters) -> float:
        """As measured so far, else what the disk's rate says."""
        if counters.sweeps:
            return counters.sweep_seconds / counters.sweeps
        return _moving_seconds(self.plan, self.reader)


def assemble(config: EngineConfig, listener: Listener | None) -> Assembly:
    """Open the model, plan, load what stays; on failure nothing is left open."""
    if config.quantization is not None:
        config = dataclasses.replace(config, packed=_pack(config, config.quantization, listener))
    draft = None if config.draft_model is None else assemble(draft_config(config), None)
    reader = DirectReader()
    try:
        if draft is not None:
            host = draft.plan.host
            config = dataclasses.replace(
                config,
                reserved_bytes=draft.plan.planned_bytes,
                reserved_host_bytes=0 if host is None else host.planned_bytes,
            )
        plan, skeleton, folder = plan_model(config)
        placement = _open_devices(config, plan)
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        if draft is not None:
            check_same_tokens(config, tokenizer, draft.tokenizer)
        logger.info("%s within %s\n%s", config.model, "its plan" if config.memory_bytes is None else "the budget", plan)
        with nullcontext() if placement is None else placement.first.use():
            return _assemble(config, folder, skeleton, tokenizer, plan, reader, listener, draft, placement)
    except BaseException:
        reader.close()
        if draft is not None:
            draft.close()
        raise


def _open_devices(config: EngineConfig, plan: Plan) -> Placement | None:
    """The accelerators that *plan* is for, each within its ceiling; ``None``: the processor computes.

    Raises:
        ConfigurationError: one is not there, or the host has less memory than they are to have behind them.
    """
    devices = devices_of(config)
    numbers = plan.devices or (0,)
    opened = [(open_device(devices[at]), at, part) for at, part in zip(numbers, plan.by_device, strict=True)]
    for device, number, part in opened:
        if device is None:
            return None
        device.limit(part.budget_bytes + (config.reserved_bytes if number == 0 else 0))
    _check_host(config)
    layers = plan.layers or (0,) * plan.facts.num_layers
    return Placement(tuple(device for device, _, _ in opened if device is not None), layers)


def _look_at_source(files: Sequence[Path], plan: Plan, rate: float | None) -> None:
    """Say so where every sweep is going to wait for a network, or for a slow disk."""
    if not plan.disk_bytes:
        return
    kind = network_file_system(files[0])
    if kind is not None:
        logger.warning(
            "the model lies on a network folder (%s): every sweep reads %s from it; copy the model to a local disk",
            kind,
            format_size(plan.disk_bytes),
        )
    if rate is not None and rate < SLOW_DISK:
        logger.warning(
            "the disk brings %.0f MB/s: every sweep takes %.0f s at least; move the model to a faster disk, give the "
            "engine more memory, or quantise the model",
            rate / 1e6,
            plan.disk_bytes / rate,
        )


def _computes(device: str, plan: Plan, prefers_flash: bool) -> str:
    """What computes, as far as its results depend on it."""
    parts = [device]
    if prefers_flash:
        parts.append("flash-attn")
    if plan.weights.expert_slots and plan.facts.host_fused_rows is not None:
        parts.append("experts on the host")
    return ", ".join(parts)


def _moving_seconds(plan: Plan, reader: DirectReader, assumed: float = ASSUMED_READ_RATE, *, rows: int = 1) -> float:
    """What a sweep's weights take to where they are computed with: from disk, and over the link beside it; of experts
    those that *rows* are likely to be routed to."""
    link = 0.0
    if plan.host is not None:
        link = (plan.link_bytes + plan.expert_link_bytes(rows) - plan.expert_link_bytes(1)) / ASSUMED_LINK_RATE
    num_bytes = plan.weights.disk_bytes + plan.expert_read_bytes(rows)
    return max(num_bytes / (reader.rate() or assumed), link)


def _check_host(config: EngineConfig) -> None:
    """Pinned memory cannot be swapped out: more than is free would take the machine down."""
    wanted, free = config.host_memory_bytes, available_memory_bytes()
    if wanted is not None and wanted > free:
        raise ConfigurationError(
            f"host_memory is {format_size(wanted)}, and {format_size(free)} of host memory are free: pass less, or "
            "leave it out and the plan takes what there is"
        )


def _pack(config: EngineConfig, kind: str, listener: Listener | None) -> Path:
    """The folder of the model in *kind*, converted now if it was not before."""

    def on_shard(done: int, count: int, num_bytes: int) -> None:
        if listener is not None:
            listener(PackProgress(done, count))

    return ensure_packed(locate_model(config), kind, trust_remote_code=config.trust_remote_code, on_shard=on_shard)


def identify(config: EngineConfig, store: KVStoreConfig, memory: DigestMemory) -> tuple[str, dict[str, Any]]:
    """Namespace and description of the KV that *config* would compute, without loading its weights.

    Raises:
        KVStoreUnusable: the model's files are being changed.
    """
    plan, skeleton, folder = plan_model(config)
    digests = WeightFiles.of(weight_paths(skeleton)).take_digests(memory)
    if digests is None:
        raise KVStoreUnusable(f"the files of {config.model} are being changed; try again when they are whole")
    devices = devices_of(config)
    names = [device_name(devices[number]) for number in plan.devices or (0,)]
    prefers_flash = resolve_attention(config.attention, devices[0])
    computes = _computes(names_of_layers(names, plan.layers), plan, prefers_flash)
    fingerprint = describe(store, folder, skeleton, plan, digests, computes)
    return namespace(fingerprint, store.salt), {"model": config.model, "fingerprint": fingerprint}


def _assemble(
    config: EngineConfig,
    folder: Path,
    skeleton: Skeleton,
    tokenizer: Any,
    plan: Plan,
    reader: DirectReader,
    listener: Listener | None,
    draft: Assembly | None,
    placement: Placement | None,
) -> Assembly:
    devices = () if placement is None else placement.devices
    footprint = Footprint() if draft is None else draft.step.footprint  # before any of the budget is taken
    kv_bytes = plan.kv_bytes if plan.host is None else plan.host.kv_bytes
    memory = PageMemory(kv_bytes, devices[0] if devices else None)
    transit = Transit(plan.num_transit, plan.page_tokens)
    prefers_flash = placement is not None and resolve_attention(config.attention, placement.first.torch_device)
    states = [
        LayerState(plan.num_pages, plan.page_tokens, memory, layer, transit)
        for layer in range(skeleton.config.num_hidden_layers)
    ]
    store = None
    if config.kv_store is not None:  # before the weights: a folder that cannot be used is said at once
        store = open_store(
            config.kv_store,
            is_default=config.kv_store_is_default,
            model=config.model,
            folder=folder,
            skeleton=skeleton,
            plan=plan,
            states=states,
            reader=reader,
            computes=_computes("cpu" if placement is None else placement.name, plan, prefers_flash),
            sweep_seconds=lambda: _moving_seconds(plan, reader, HOPED_READ_RATE),
        )
    weights: ModelWeights | None = None
    try:
        if plan.streams:  # then all of it was counted for KV; else it may be much more than is ever used
            threading.Thread(target=memory.populate, name="layerstream-populate", daemon=True).start()
        loaded = plan.resident_bytes + plan.weights.expert_bytes
        if plan.host is not None:
            loaded += plan.host.resident_bytes + plan.host.expert_bytes
        on_load = _LoadCounter(loaded, listener).add
        units = [part.weights for part in plan.by_device]
        weights = ModelWeights(
            skeleton,
            plan.weights,
            reader,
            on_load,
            plan.facts.fused_rows,
            placement,
            units,
            plan.facts.expert_shares,
            plan.facts.host_fused_rows,
        )
        embedding = _embedding(skeleton, plan, weights, reader)
        _look_at_source(weight_paths(skeleton), plan, reader.rate())
        reader.restart_rate()
        if weights.streamer is not None:
            weights.streamer.read_ahead()
        swap = PageSwap(states)
        scheduler = _scheduler(skeleton, plan, store, reader, weights.bank)
        steward = Steward(scheduler, swap, store)
        loader = None if store is None else store.loader
        device_kv = None
        if placement is not None:
            rides = [part.facts.kv_rides for part in plan.by_device]
            device_kv = DeviceKV(placement, states, plan.num_pages, plan.page_tokens, rides)
        statistics = ExpertUsage(weight_paths(skeleton), plan.facts.experts) if weights.experts else None
        learn = None if devices else partial(correct, plan, str(skeleton.dtype).removeprefix("torch."))
        runner = SweepRunner(
            skeleton, weights, embedding, states, plan.head_rows, loader, placement, device_kv, prefers_flash
        )
        return Assembly(
            config=config,
            tokenizer=tokenizer,
            defaults=load_defaults(folder, skeleton.config, tokenizer),
            plan=plan,
            context_length=min(plan.facts.context_length, scheduler.max_prompt_tokens),
            model_bytes=skeleton.model_bytes,
            skeleton=skeleton,
            reader=reader,
            weights=weights,
            scheduler=scheduler,
            step=SweepStep(steward, runner, weights, devices, statistics, footprint, learn),
            drafting=TreeDrafting(_drafters(config, store, draft), scheduler.budget),
            store=store,
            swap=swap,
            draft=draft,
            devices=devices,
            page_memory=memory,
        )
    except BaseException:
        if store is not None:
            store.close()
        if weights is not None:
            weights.close()
        memory.close()
        raise


def _scheduler(
    skeleton: Skeleton,
    plan: Plan,
    store: PrefixStore | None,
    reader: DirectReader,
    experts: AnyBank | None,
) -> Scheduler:
    limits = SweepLimits(
        max_tokens=plan.max_sweep_tokens,
        chunk_tokens=plan.page_tokens,
        decode_rows=plan.decode_rows,
        prompt_rows=plan.prompt_rows,
        one_sequence_per_block=skeleton.config.model_type in ONE_SEQUENCE_PER_BLOCK,
        max_draft_rows=plan.max_draft_rows,
        max_sequences=plan.max_sequences,
    )
    num_transit = plan.num_transit if store is not None else 0
    pool = PagePool(plan.num_pages, plan.page_tokens, num_transit)
    load = None if experts is None else _ExpertLoad(experts, plan.facts.mean_expert_bytes, reader)
    return Scheduler(limits, pool, store, lambda: _moving_seconds(plan, reader, rows=0), can_swap=True, experts=load)


class _ExpertLoad:
    """What the bank expects of rows, at the rates of disk and link."""

    def __init__(self, bank: AnyBank, expert_bytes: float, reader: DirectReader) -> None:
        self._bank = bank
        self._expert_bytes = expert_bytes
        self._reader = reader

    def wanted(self, num_rows: int) -> float:
        return self._bank.expected(num_rows)[0]

    def read_seconds(self, num_rows: int) -> float:
        rate = self._reader.rate() or ASSUMED_READ_RATE
        _, crossing, reading = self._bank.expected(num_rows)
        return max(reading * self._expert_bytes / rate, crossing * self._bank.crossing_seconds)


def _drafters(config: EngineConfig, store: PrefixStore | None, draft: Assembly | None) -> list[Drafter]:
    if config.speculation == "off":
        return []
    drafters: list[Drafter] = [SuffixDrafter()]
    if store is not None and config.kv_store is not None and config.kv_store.answers:
        drafters.append(AnswerDrafter(store))
    if draft is not None:
        drafters.append(ModelDrafter(draft.scheduler, draft.step))
    return drafters


def _embedding(skeleton: Skeleton, plan: Plan, weights: ModelWeights, reader: DirectReader) -> EmbeddingRows:
    source = skeleton.sources[skeleton.embedding_key]
    resident: torch.Tensor | None = None
    if skeleton.is_tied:
        resident = weights.resident_matrix(skeleton.head_key)
    elif plan.embedding_resident:
        resident = weights.load_matrix(skeleton.embedding_key, reader)
    return EmbeddingRows(source, skeleton.dtype, reader, max_rows=plan.max_sweep_rows, resident=resident)


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

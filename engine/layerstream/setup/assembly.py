"""Puts an engine together from its configuration: ground, KV, weights, scheduler, step, drafters.

Whatever has something to let go of is handed to one :class:`Closing` as soon as it is there. It is closed with
:meth:`Assembly.close`, or at once where the making of another part fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.api.events import Listener, PackProgress
from layerstream.errors import KVStoreUnusable
from layerstream.hardware.arena import Arenas
from layerstream.hardware.device import Device
from layerstream.hardware.footprint import Footprint
from layerstream.hardware.reader import DirectReader
from layerstream.hardware.timeline import Timeline
from layerstream.model.model_weights import ModelWeights
from layerstream.model.skeleton import Skeleton
from layerstream.planner import Plan
from layerstream.runtime.draft_model import ModelDrafter
from layerstream.runtime.loop import LoopCounters
from layerstream.runtime.step import SweepStep
from layerstream.runtime.steward import Steward
from layerstream.scheduling.drafting.base import Drafter
from layerstream.scheduling.drafting.trees import TreeDrafting
from layerstream.scheduling.scheduler import Scheduler
from layerstream.setup.closing import Closing
from layerstream.setup.config import EngineConfig
from layerstream.setup.draft import check_same_tokens, draft_config
from layerstream.setup.groundwork import Groundwork, what_computes
from layerstream.setup.movable import check_movable
from layerstream.setup.mtp import make_mtp
from layerstream.setup.open_store import describe, weight_paths
from layerstream.setup.pack import ensure_packed
from layerstream.setup.parts import (
    KVParts,
    begin_reading,
    load_weights,
    make_drafters,
    make_kv,
    make_runner,
    make_step,
    make_steward,
)
from layerstream.setup.plan_model import locate_model, plan_model
from layerstream.store.config import KVStoreConfig
from layerstream.store.fingerprint import DigestMemory, WeightFiles, namespace
from layerstream.store.popularity import Popularity
from layerstream.store.store import PrefixStore
from layerstream.text.defaults import GenerationDefaults, load_defaults


@dataclass(frozen=True, slots=True)
class Assembly:
    """An engine's parts, before its thread starts. ``draft``: the parts of the one that guesses."""

    ground: Groundwork
    kv: KVParts
    weights: ModelWeights
    steward: Steward
    step: SweepStep
    drafting: TreeDrafting
    defaults: GenerationDefaults
    draft: Assembly | None
    closing: Closing

    @property
    def config(self) -> EngineConfig:
        """What was asked for."""
        return self.ground.config

    @property
    def plan(self) -> Plan:
        """How the budget is spent."""
        return self.ground.plan

    @property
    def skeleton(self) -> Skeleton:
        """The model without its weights."""
        return self.ground.skeleton

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.ground.tokenizer

    @property
    def reader(self) -> DirectReader:
        """What reads the model's files."""
        return self.ground.reader

    @property
    def devices(self) -> tuple[Device, ...]:
        """What computes; none: the processor."""
        return self.ground.devices

    @property
    def scheduler(self) -> Scheduler:
        """What decides on sweeps."""
        return self.steward.scheduler

    @property
    def store(self) -> PrefixStore | None:
        """Where KV outlives the process."""
        return self.kv.store

    @property
    def popularity(self) -> Popularity:
        """How often documents were retrieved."""
        return self.kv.popularity

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return min(self.plan.facts.context_length, self.scheduler.max_prompt_tokens)

    def count_cached(self, keys: Seq[bytes]) -> int:
        """How many of the pages *keys*, from the first on, need not be computed: in memory, or stored. Any thread."""
        in_memory = self.scheduler.count_cached(keys)
        if self.store is None or in_memory == len(keys):
            return in_memory
        return max(in_memory, self.store.look_up(keys))

    def close(self) -> None:
        """Write what is to be stored, let go of all files, end all threads. Idempotent; never raises."""
        self.closing.close()

    def record(self, timeline: Timeline | None) -> None:
        """Have *timeline* told what goes on from here, between two sweeps; ``None``: no more."""
        self.reader.timeline = timeline
        self.weights.record(timeline)

    def seconds_per_sweep(self, counters: LoopCounters) -> float:
        """As measured so far, else what the disk's rate says."""
        return counters.sweep_seconds / counters.sweeps if counters.sweeps else self.ground.moving_seconds()


def assemble(config: EngineConfig, listener: Listener | None) -> Assembly:
    """Open the model, plan, load what stays; on failure nothing is left open."""
    if config.quantization is not None:
        config = dataclasses.replace(config, packed=_pack(config, config.quantization, listener))
    with Closing() as closing, closing.keep(Arenas()).collecting():
        draft = None if config.draft_model is None else closing.keep(assemble(draft_config(config), None))
        config = config if draft is None else _beside(config, draft)
        ground = Groundwork.lay(config, closing.keep(DirectReader()))
        if draft is not None:
            check_same_tokens(config, ground.tokenizer, draft.tokenizer)
        with ground.computing():
            return _assemble(ground, draft, listener, closing)


def _assemble(ground: Groundwork, draft: Assembly | None, listener: Listener | None, closing: Closing) -> Assembly:
    if ground.config.reuse == "anywhere":
        check_movable(
            ground.skeleton, trust_remote_code=ground.config.trust_remote_code, is_on_device=bool(ground.devices)
        )
    seen = Footprint() if draft is None else draft.step.footprint  # before any of the budget is taken
    kv = make_kv(ground, closing)  # before the weights: a store's folder that cannot be used is said at once
    weights = closing.keep(load_weights(ground, listener))
    steward = make_steward(ground, kv, weights.banks)
    runner = make_runner(ground, kv, weights, closing)
    step = closing.keep(make_step(ground, runner, weights, steward, seen))
    models: list[Drafter] = [] if draft is None else [ModelDrafter(draft.steward, draft.step)]
    has_gaps = ground.config.reuse == "anywhere"  # hidden states of what is moved are not there to go on from
    if not has_gaps and (mtp := make_mtp(ground, runner, weights, closing)) is not None:
        step.tell(mtp.saw)
        models.append(mtp)
    begin_reading(ground, weights)
    return Assembly(
        ground=ground,
        kv=kv,
        weights=weights,
        steward=steward,
        step=step,
        drafting=TreeDrafting(make_drafters(ground, kv.store, models), steward.scheduler.budget),
        defaults=load_defaults(ground.folder, ground.skeleton.config, ground.tokenizer),
        draft=draft,
        closing=closing,
    )


def identify(config: EngineConfig, store: KVStoreConfig, memory: DigestMemory) -> tuple[str, dict[str, Any]]:
    """Namespace and description of the KV that *config* would compute, without loading its weights.

    Raises:
        KVStoreUnusable: the model's files are being changed.
    """
    plan, skeleton, folder = plan_model(config)
    digests = WeightFiles.of(weight_paths(skeleton)).take_digests(memory)
    if digests is None:
        raise KVStoreUnusable(f"the files of {config.model} are being changed; try again when they are whole")
    fingerprint = describe(store, folder, skeleton, plan, digests, what_computes(config, plan))
    return namespace(fingerprint, store.salt), {"model": config.model, "fingerprint": fingerprint}


def _beside(config: EngineConfig, draft: Assembly) -> EngineConfig:
    """*config* less the memory that *draft* has."""
    host = draft.plan.host
    return dataclasses.replace(
        config,
        reserved_bytes=draft.plan.planned_bytes,
        reserved_host_bytes=0 if host is None else host.planned_bytes,
    )


def _pack(config: EngineConfig, kind: str, listener: Listener | None) -> Path:
    """The folder of the model in *kind*, converted now if it was not before."""

    def on_shard(done: int, count: int, num_bytes: int) -> None:
        if listener is not None:
            listener(PackProgress(done, count))

    return ensure_packed(locate_model(config), kind, trust_remote_code=config.trust_remote_code, on_shard=on_shard)

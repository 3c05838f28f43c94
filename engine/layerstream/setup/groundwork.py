"""What an engine is built on: its model, planned, and what computes it. None of the budget is taken yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError
from layerstream.hardware.accelerators import device_name, open_device
from layerstream.hardware.device import Device, Placement, names_of_layers
from layerstream.hardware.machine import available_memory_bytes, network_file_system
from layerstream.hardware.reader import ASSUMED_READ_RATE, DirectReader
from layerstream.model.device_attention import VERSION, resolve_attention
from layerstream.model.skeleton import Skeleton
from layerstream.planner import Plan
from layerstream.planner.rates import SLOW_DISK
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import devices_of, plan_model
from layerstream.streaming.experts.paths import ASSUMED_LINK_RATE
from layerstream.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Groundwork:
    """What all parts of an engine are made from. ``placement``: what computes; ``None``: the processor."""

    config: EngineConfig
    plan: Plan
    skeleton: Skeleton
    folder: Path
    tokenizer: Any
    reader: DirectReader
    placement: Placement | None

    @classmethod
    def lay(cls, config: EngineConfig, reader: DirectReader) -> Groundwork:
        """Plan the model of *config* and open the devices that the plan is for.

        Raises:
            LayerStreamError: it cannot be planned, or a device is not there.
        """
        plan, skeleton, folder = plan_model(config)
        placement = _open_devices(config, plan)
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        logger.info("%s within %s\n%s", config.model, "its plan" if config.memory_bytes is None else "the budget", plan)
        return cls(config, plan, skeleton, folder, tokenizer, reader, placement)

    @property
    def devices(self) -> tuple[Device, ...]:
        """The accelerators that compute."""
        return () if self.placement is None else self.placement.devices

    @property
    def prefers_flash(self) -> bool:
        """Whether the accelerators attend with the flash-attn package."""
        placement = self.placement
        return placement is not None and resolve_attention(self.config.attention, placement.first.torch_device)

    @property
    def computes(self) -> str:
        """What computes, as far as its results depend on it."""
        return _computes("cpu" if self.placement is None else self.placement.name, self.plan, self.prefers_flash)

    def computing(self) -> AbstractContextManager[None]:
        """Entered around what is made for the first device."""
        return nullcontext() if self.placement is None else self.placement.first.use()

    def moving_seconds(self, assumed_rate: float = ASSUMED_READ_RATE, *, rows: int = 1) -> float:
        """What a sweep's weights take to where they are computed with: from disk, and over the link beside it; of
        experts those that *rows* are likely to be routed to."""
        plan, link = self.plan, 0.0
        if plan.host is not None:
            link = (plan.link_bytes + plan.expert_link_bytes(rows) - plan.expert_link_bytes(1)) / ASSUMED_LINK_RATE
        num_bytes = plan.weights.disk_bytes + plan.expert_read_bytes(rows)
        return max(num_bytes / (self.reader.rate() or assumed_rate), link)


def what_computes(config: EngineConfig, plan: Plan) -> str:
    """As :attr:`Groundwork.computes` will be, without opening a device."""
    devices = devices_of(config)
    names = [device_name(devices[number]) for number in plan.devices or (0,)]
    return _computes(names_of_layers(names, plan.layers), plan, resolve_attention(config.attention, devices[0]))


def look_at_source(files: Sequence[Path], plan: Plan, rate: float | None) -> None:
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


def _open_devices(config: EngineConfig, plan: Plan) -> Placement | None:
    """The accelerators that *plan* is for, each within its ceiling; ``None``: the processor computes.

    Raises:
        ConfigurationError: one is not there, or the host has less memory than they are to have behind them.
    """
    devices = devices_of(config)
    numbers = plan.devices or (0,)
    opened = [(open_device(devices[at]), at, part) for at, part in zip(numbers, plan.by_device, strict=True)]
    beside = config.reserved_bytes + (0 if plan.mtp is None else plan.mtp.planned_bytes)
    for device, number, part in opened:
        if device is None:
            return None
        device.limit(part.budget_bytes + (beside if number == 0 else 0))
    _check_host(config)
    layers = plan.layers or (0,) * plan.facts.num_layers
    return Placement(tuple(device for device, _, _ in opened if device is not None), layers)


def _check_host(config: EngineConfig) -> None:
    """Pinned memory cannot be swapped out: more than is free would take the machine down."""
    wanted, free = config.host_memory_bytes, available_memory_bytes()
    if wanted is not None and wanted > free:
        raise ConfigurationError(
            f"host_memory is {format_size(wanted)}, and {format_size(free)} of host memory are free: pass less, or "
            "leave it out and the plan takes what there is"
        )


def _computes(device: str, plan: Plan, prefers_flash: bool) -> str:
    parts = [device] if plan.host is None else [device, f"formulas {VERSION}"]
    if prefers_flash:
        parts.append("flash-attn")
    if plan.weights.expert_slots and plan.facts.host_fused_rows is not None:
        parts.append("experts on the host")
    return ", ".join(parts)

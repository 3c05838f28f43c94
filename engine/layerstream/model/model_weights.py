"""The weights of a whole model, wherever they are computed with: on the processor, on a device, or on several.

Where several devices compute, each has the weights of its own layers, with rings and residents of its own
(:class:`DeviceWeights`), and what a layer is given crosses to its device first. Hidden states cross once for a layer;
what all layers are given alike (rotary embeddings) crosses once for a sweep and a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat
from typing import Any

import torch

from layerstream.hardware.device import Device, Placement
from layerstream.hardware.reader import DirectReader
from layerstream.hardware.timeline import Timeline
from layerstream.model.context import current
from layerstream.model.device_weights import DeviceWeights
from layerstream.model.linear import SlicedLinear
from layerstream.model.skeleton import Skeleton
from layerstream.model.unit_weights import OnBytes
from layerstream.planner import Plan
from layerstream.streaming.experts.device_bank import AnyBank
from layerstream.streaming.streamer import Source, Streams


class ModelWeights:
    """The weights of *skeleton* under a plan.

    Args:
        placement: the devices of the plan; ``None``: the processor computes.

    Attributes:
        plan: all units.
        streamer: what brings weights for sweeps; ``None`` if all are resident.
        is_recorded: whether a timeline is told of waits, copies and compute.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        reader: DirectReader,
        on_load: OnBytes,
        placement: Placement | None = None,
    ) -> None:
        self.plan = plan.weights
        self.is_recorded = False
        self._parts: list[DeviceWeights] = []
        owners: dict[str, DeviceWeights] = {}
        try:
            if placement is None:
                self._parts.append(DeviceWeights(skeleton, plan, reader, on_load))
                self._routed = [(self._parts[0], node.num_experts) for node in skeleton.routed]
            else:
                for place, (device, part) in enumerate(zip(placement.devices, plan.by_device, strict=True)):
                    computes = _computes(skeleton, placement, place)
                    with device.use():
                        self._parts.append(DeviceWeights(skeleton, part, reader, on_load, device, computes))
                    owners |= {node.name: self._parts[-1] for node in skeleton.routed if computes(node.name)}
        except BaseException:
            self.close()
            raise
        if placement is not None and len(placement.devices) > 1:
            _install_crossings(skeleton, placement)
        self._routed = [(owners.get(node.name, self._parts[0]), node.num_experts) for node in skeleton.routed]
        bringing = [source for part in self._parts for source in (part.streamer, part.bank) if source is not None]
        self.streamer: Source | None = Streams(bringing) if len(bringing) > 1 else next(iter(bringing), None)

    @property
    def head(self) -> SlicedLinear:
        """The output projection."""
        return next(part.head for part in self._parts if part.head is not None)

    @property
    def banks(self) -> list[AnyBank]:
        """What brings experts as they are routed to: one for each device; none, where they come with their blocks."""
        return [part.bank for part in self._parts if part.bank is not None]

    def expert_shares(self) -> list[float]:
        """How much each expert of the model was used lately, but for a factor; 0.0 of one that comes with its block."""
        shares = {id(part): iter(part.bank.cache.shares()) for part in self._parts if part.bank is not None}
        return [next(shares.get(id(part), repeat(0.0))) for part, count in self._routed for _ in range(count)]

    def tell(self, on_unit: OnBytes) -> None:
        """Have *on_unit* told the weight bytes of each unit that was computed; it may raise to abandon the sweep."""
        for part in self._parts:
            part.tell(on_unit)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, units are computed without being asked for one by one; who is told of them is told at the end."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.at_once())
            yield

    def resident_matrix(self, key: str) -> torch.Tensor | None:
        """The whole tensor *key* of the output projection, if it is resident in one piece."""
        return next((found for part in self._parts if (found := part.resident_matrix(key)) is not None), None)

    def load_matrix(self, key: str, reader: DirectReader) -> torch.Tensor:
        """Load one more tensor to stay, in its compute dtype, where the first layer is computed."""
        return self._parts[0].load_matrix(key, reader)

    def record(self, timeline: Timeline | None) -> None:
        """Have *timeline* told of waits, copies and compute; ``None``: no more."""
        for part in self._parts:
            part.record(timeline)
        self.is_recorded = timeline is not None

    def close(self) -> None:
        """Let go of what streams; nothing is under way. Idempotent."""
        for part in self._parts:
            part.close()


def _computes(skeleton: Skeleton, placement: Placement, place: int) -> Callable[[str], bool]:
    """Whether the module of a path is computed at *place*: layers where they were put, what follows them with the last
    of them, the rest with the first."""
    first, last = placement.layers[0], placement.layers[-1]
    places: dict[str, int] = {skeleton.head.name: last}
    seen = False
    for node in skeleton.body:
        seen = seen or node.layer is not None
        places[node.name] = placement.layers[node.layer] if node.layer is not None else last if seen else first

    def computes(path: str) -> bool:
        within = (at for name, at in places.items() if path == name or path.startswith(f"{name}."))
        return next(within, first) == place

    return computes


def _install_crossings(skeleton: Skeleton, placement: Placement) -> None:
    for node in skeleton.body:
        if node.layer is not None:
            _install_crossing(skeleton.model.get_submodule(node.name), placement.of(node.layer))


def _install_crossing(layer: torch.nn.Module, device: Device) -> None:
    """Have what *layer* is given cross to *device*."""
    forward = layer.forward

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        crossed = current().crossed
        with device.use():
            hidden = hidden_states.to(device.torch_device, non_blocking=True)
            args, kwargs = _cross((args, kwargs), device.torch_device, crossed)
            return forward(hidden, *args, **kwargs)

    layer.forward = run


def _cross(value: Any, device: torch.device, crossed: dict[tuple[int, torch.device], Any]) -> Any:
    """*value* with all its tensors on *device*; those that crossed in this sweep are known."""
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        known = crossed.get((id(value), device))
        if known is None:  # kept with the original, so that no other tensor gets its id
            known = crossed[id(value), device] = value, value.to(device, non_blocking=True)
        return known[1]
    if isinstance(value, tuple | list):
        return type(value)(_cross(item, device, crossed) for item in value)
    if isinstance(value, dict):
        return {key: _cross(item, device, crossed) for key, item in value.items()}
    return value

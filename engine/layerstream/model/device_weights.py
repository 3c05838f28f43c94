"""Joins a plan with a skeleton: every unit becomes resident or streams, and its modules know which.

Lifetimes: resident tensors live as long as this object; streamed ones are views into the ring, bound when their
module runs and unbound right after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch

from layerstream.checkpoint.names import PackedSource
from layerstream.hardware.device import Device
from layerstream.hardware.reader import DirectReader
from layerstream.hardware.timeline import Timeline
from layerstream.model import hooks
from layerstream.model.block_experts import install_experts
from layerstream.model.linear import JoinedLinears, LinearSlice, PlainMatrix, SlicedLinear
from layerstream.model.matrices import Matrices, Weights, packed_parts
from layerstream.model.norms import fuse as fuse_norm
from layerstream.model.rotary import Rotaries
from layerstream.model.skeleton import Skeleton
from layerstream.model.unit_weights import OnBytes, Passing, Resident, Staying, Watch
from layerstream.planner import Plan
from layerstream.planner.units import PlannedUnit
from layerstream.streaming.copy_feed import CopyFeed
from layerstream.streaming.experts.device_bank import AnyBank
from layerstream.streaming.feed import Feed, ReadFeed
from layerstream.streaming.host_source import HostSource
from layerstream.streaming.layout import Part, UnitLayout, lay_out
from layerstream.streaming.loader import load_unit
from layerstream.streaming.streamer import Streamer

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of Linears in one module that take the same input; checked at every call."""


@dataclass(slots=True, eq=False)
class _Unit:
    """A unit of the plan, and where its weights are, once they are there.

    ``stays``: where it is computed with; ``stays_on_host``: behind a device. ``is_matrix``: it is a Linear, or rows of
    one, that computes slice by slice.
    """

    planned: PlannedUnit
    layout: UnitLayout
    stays: bool
    stays_on_host: bool
    is_matrix: bool
    place: Resident | Staying | Passing | None = None


class DeviceWeights:
    """The weights that one device computes with, under a plan: those of the whole model, or of some of its layers.

    Args:
        device: what computes; ``None``: the processor, where the weights are then.
        computes: whether the module of a path is computed there.

    Attributes:
        plan: which units there are, and which of them stay.
        streamer: brings the streamed units; ``None`` if all are resident.
        bank: brings experts as they are routed to; ``None`` if there are none, or they come with their block.
        head: the output projection; ``None``: another device has it.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        reader: DirectReader,
        on_load: OnBytes,
        device: Device | None = None,
        computes: Callable[[str], bool] = lambda path: True,
    ) -> None:
        facts = plan.facts
        self._skeleton = skeleton
        self._device = device
        self._computes = computes
        self._matrices = Matrices(skeleton, facts.fused_rows, None if device is None else device.torch_device)
        self._watch = Watch(device)
        self.plan = plan.weights
        units = [self._unit(index) for index in range(len(self.plan.units))]
        self._body, self._head = units[: len(self.plan.body)], units[len(self.plan.body) :]
        self.streamer: Streamer | None = None
        self.bank: AnyBank | None = None
        try:
            self._stream([unit for unit in units if not unit.stays], reader, on_load)
            if self.plan.expert_slots:
                self.bank = install_experts(
                    skeleton,
                    self.plan,
                    self._matrices,
                    reader,
                    facts.expert_shares,
                    device,
                    facts.host_fused_rows,
                    computes,
                )
            groups = self._find_joined()
            self._load(groups, reader, on_load)
            if self.bank is not None:
                self.bank.load_hottest(on_load)
            if device is not None:
                self._fuse()
                self._move_buffers(device.torch_device)
            self._install(groups)
            self.head = SlicedLinear([self._slice(unit) for unit in self._head]) if self._head else None
        except BaseException:
            self.close()
            raise

    def resident_matrix(self, key: str) -> torch.Tensor | None:
        """The whole tensor *key* of the output projection, if it is resident in one piece."""
        places = [unit.place for unit in self._head]
        if len(places) != 1 or key != self._skeleton.head_key or not isinstance(places[0], Staying):
            return None
        matrix, _ = places[0].weights
        return matrix.weight if isinstance(matrix, PlainMatrix) else None

    def load_matrix(self, key: str, reader: DirectReader) -> torch.Tensor:
        """Load one more tensor to stay, in its compute dtype."""
        source = self._skeleton.sources[key]
        parts = list(packed_parts(source, None)) if isinstance(source, PackedSource) else [Part.whole(key, source)]
        stored = self._loaded(lay_out(key, parts), reader)
        found = self._matrices.decoded(key.rpartition(".")[0], self._matrices.converted(stored))[key]
        assert isinstance(found, torch.Tensor)
        return found

    def close(self) -> None:
        """Let go of what streams; nothing is under way. Idempotent."""
        try:
            if self.bank is not None:
                self.bank.close()
        finally:
            if self.streamer is not None:
                self.streamer.close()

    def tell(self, on_unit: OnBytes) -> None:
        """Have *on_unit* told the weight bytes of each unit that was computed; it may raise to abandon the sweep."""
        self._watch.on_unit = on_unit

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """As of the whole model's."""
        told = self._watch.on_unit
        self._watch.on_unit = lambda num_bytes: None
        try:
            yield
        finally:
            self._watch.on_unit = told
        for unit in (*self._body, *self._head):
            told(unit.layout.weight_bytes)

    def _unit(self, index: int) -> _Unit:
        unit = self.plan.units[index]
        is_matrix = index >= len(self.plan.body) or self._is_sliced(unit)
        stays, stays_on_host = index in self.plan.residents, index in self.plan.host_residents
        return _Unit(unit, lay_out(unit.name, self._parts(unit)), stays, stays_on_host, is_matrix)

    def _stream(self, units: list[_Unit], reader: DirectReader, on_load: OnBytes) -> None:
        """Have *units* pass."""
        if not units:
            return
        feed = self._feed(units, reader, on_load)
        feed.populate()
        self.streamer = Streamer(feed, num_cycle=sum(not unit.stays for unit in self._body))
        for position, unit in enumerate(units):
            unit.place = Passing(self._watch, self.streamer, position)

    def _feed(self, units: list[_Unit], reader: DirectReader, on_load: OnBytes) -> Feed:
        """Brings *units* to where they are computed with."""
        layouts = [unit.layout for unit in units]
        largest = max(layout.num_bytes for layout in layouts)  # a unit strewn over a file has more page ends
        ring_bytes = max(self.plan.ring_bytes, largest)
        if self._device is None:
            return ReadFeed(layouts, ring_bytes, reader)
        stays = {position for position, unit in enumerate(units) if unit.stays_on_host}
        source = HostSource(self._device, layouts, stays, self.plan.host_ring_bytes, reader, on_load)
        return CopyFeed(layouts, ring_bytes, self._device, source)

    def _loaded(
        self, layout: UnitLayout, reader: DirectReader, on_load: OnBytes | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of one unit, in memory of their own, where they are computed with."""
        tensors = load_unit(layout, reader, on_load)
        if self._device is None:
            return tensors
        return {key: tensor.to(self._device.torch_device) for key, tensor in tensors.items()}

    def _keys(self, unit: PlannedUnit) -> set[str]:
        """State dict names of the weights that *unit* has."""
        keys = self._skeleton.keys_of(unit.module, own_only=unit.own_only)
        return keys - set(self._skeleton.expert_keys(unit.experts)) if unit.experts else keys

    def _parts(self, unit: PlannedUnit) -> list[Part]:
        sources = self._skeleton.sources
        parts = []
        for key in sorted(self._keys(unit)):
            source = sources[key]
            if isinstance(source, PackedSource):
                parts.extend(packed_parts(source, unit.rows))
            elif unit.rows is None:
                parts.append(Part.whole(key, source))
            else:
                parts.append(Part.of_rows(key, source, *unit.rows))
        return parts

    def _load(self, groups: list[list[_Unit]], reader: DirectReader, on_load: OnBytes) -> None:
        """What is resident; each of *groups* as one matrix."""
        joined = {id(unit): group for group in groups for unit in group}
        for unit in (*self._body, *self._head):
            if unit.stays and not unit.is_matrix:
                tensors = self._matrices.converted(self._loaded(unit.layout, reader, on_load))
                unit.place = Resident(self._watch, unit.layout, tensors)
            elif unit.stays and unit.place is None:
                self._load_matrix(joined.get(id(unit), [unit]), reader, on_load)

    def _load_matrix(self, group: list[_Unit], reader: DirectReader, on_load: OnBytes) -> None:
        layouts = {unit.planned.name: unit.layout for unit in group}
        planned = [unit.planned for unit in group]
        weights = self._matrices.staying(planned, lambda unit: self._loaded(layouts[unit.name], reader, on_load))
        place = Staying(self._watch, [unit.layout for unit in group], weights)
        for unit in group:
            unit.place = place

    def _find_joined(self) -> list[list[_Unit]]:
        """Groups of resident Linears that take the same input and may be one matrix."""
        by_path = {unit.planned.module: unit for unit in self._body if unit.stays and unit.is_matrix}
        found = []
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in by_path):
            for names in SAME_INPUT:
                group = [by_path[path] for name in names if (path := f"{parent}.{name}") in by_path]
                if len(group) == len(names) and self._matrices.can_join([unit.planned for unit in group]):
                    found.append(group)
        return found

    def _is_sliced(self, unit: PlannedUnit) -> bool:
        """Whether it is a Linear, or rows of one, that computes slice by slice."""
        is_packed = isinstance(self._skeleton.sources.get(f"{unit.module}.weight"), PackedSource)
        return unit.rows is not None or (is_packed and unit.decode_bytes > 0)

    def _install(self, groups: list[list[_Unit]]) -> None:
        """Hang the body's units onto their modules."""
        for group in groups:
            self._install_joined(group)
        wrapped = {unit.planned.module for group in groups for unit in group}
        for (path, is_matrix), found in groupby(self._body, key=lambda unit: (unit.planned.module, unit.is_matrix)):
            units = list(found)
            if path in wrapped:
                continue
            module, first = self._skeleton.model.get_submodule(path), units[0]
            if is_matrix:
                SlicedLinear([self._slice(unit) for unit in units]).install(module)
            else:
                self._install_module(first, module)
            if not first.planned.own_only:
                wrapped.add(path)
        self._wrap_weightless(wrapped)

    def _install_joined(self, group: list[_Unit]) -> None:
        """Have resident Linears with the same input multiply by one matrix."""
        place = group[0].place
        assert isinstance(place, Staying)
        rows = [self._matrices.rows(unit.planned)[1] for unit in group]
        whole = SlicedLinear([LinearSlice(0, sum(rows), place)])
        modules = [self._skeleton.model.get_submodule(unit.planned.module) for unit in group]
        JoinedLinears(whole, rows).install(modules)

    def _install_module(self, unit: _Unit, module: torch.nn.Module) -> None:
        planned, place = unit.planned, unit.place
        binding = self._binding(planned, module)
        assert isinstance(place, Resident | Passing)
        if planned.own_only or (isinstance(place, Resident) and not planned.decode_bytes):
            assert isinstance(place, Resident), "what a module owns itself is pinned"
            binding.bind(self._matrices.decoded(planned.module, place.tensors))
            if not planned.own_only:
                hooks.wrap(module, place.stored, routes=bool(planned.experts))
            return
        hooks.wrap(module, lambda: self._bound(planned, place, binding), routes=bool(planned.experts))

    def _binding(self, unit: PlannedUnit, module: torch.nn.Module) -> hooks.Binding:
        return hooks.Binding(module, unit.module, self._keys(unit), self._skeleton.dtypes)

    def _wrap_weightless(self, wrapped: set[str]) -> None:
        """Modules outside of every unit (rotary embeddings, activations of a cut MLP) compute by row blocks too."""
        decoder = self._skeleton.decoder
        prefix = self._skeleton.path_of(decoder)
        tables = self._skeleton.anatomy.embedding, self._skeleton.anatomy.layer_embedding
        for path, module in decoder.named_modules(prefix=prefix):
            is_leaf = next(module.children(), None) is None
            inside = any(path == other or path.startswith(f"{other}.") for other in wrapped)
            if is_leaf and not inside and module not in tables and self._computes(path):
                hooks.wrap(module)

    def _fuse(self) -> None:
        """What transformers computes of single values is launched at once."""
        rotaries = Rotaries()
        for path, module in self._skeleton.decoder.named_modules(prefix=self._skeleton.path_of(self._skeleton.decoder)):
            if self._computes(path):
                fuse_norm(module, self._skeleton.dtype)
                rotaries.fuse(module)

    def _move_buffers(self, device: torch.device) -> None:
        """What is no weight and is real already (frequencies of rotary embeddings)."""
        for path, module in self._skeleton.model.named_modules():
            for name in module._non_persistent_buffers_set if self._computes(path) else ():
                buffer = module._buffers[name]
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def record(self, timeline: Timeline | None) -> None:
        """Have *timeline* told of waits, copies and compute; ``None``: no more."""
        self._watch.timeline = timeline
        if self.streamer is not None:
            self.streamer.record(timeline)
        if self.bank is not None:
            self.bank.timeline = timeline

    @contextmanager
    def _bound(self, unit: PlannedUnit, place: Resident | Passing, binding: hooks.Binding) -> Iterator[None]:
        with place.stored() as tensors:
            binding.bind(self._matrices.decoded(unit.module, tensors))
            try:
                yield
            finally:
                binding.unbind()

    def _slice(self, unit: _Unit) -> LinearSlice:
        rows, place = self._matrices.rows(unit.planned), unit.place
        if isinstance(place, Staying):
            return LinearSlice(*rows, place)
        assert isinstance(place, Passing)
        return LinearSlice(*rows, lambda: self._slice_weights(unit.planned, place))

    @contextmanager
    def _slice_weights(self, unit: PlannedUnit, place: Passing) -> Iterator[Weights]:
        with place.stored() as stored:
            yield self._matrices.passing(unit, stored)

"""Joins a plan with a skeleton: every unit becomes resident or streams, and its modules know which.

Lifetimes: resident tensors live as long as this object; streamed ones are views into the ring, bound when their
module runs and unbound right after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch

from layerstream.checkpoint.names import PackedSource
from layerstream.hardware.device import Device, Mark
from layerstream.hardware.reader import DirectReader
from layerstream.hardware.timeline import Timeline
from layerstream.model import hooks
from layerstream.model.block_experts import install_experts
from layerstream.model.linear import JoinedLinears, LinearSlice, PlainMatrix, SlicedLinear
from layerstream.model.matrices import Matrices, Weights, packed_parts
from layerstream.model.skeleton import Skeleton
from layerstream.planner.units import PlannedUnit, UnitPlan
from layerstream.streaming.copy_feed import CopyFeed
from layerstream.streaming.experts.device_bank import AnyBank
from layerstream.streaming.feed import Feed, ReadFeed
from layerstream.streaming.host_source import HostSource
from layerstream.streaming.layout import Part, UnitLayout, lay_out
from layerstream.streaming.loader import load_unit
from layerstream.streaming.streamer import Streamer

OnBytes = Callable[[int], None]
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of Linears in one module that take the same input; checked at every call."""


class DeviceWeights:
    """The weights that one device computes with, under a plan: those of the whole model, or of some of its layers.

    Args:
        fused_rows: for each kernel that multiplies by quantised weights, the rows it is faster for than decoding them.
        device: what computes; ``None``: the processor, where the weights are then.
        computes: whether the module of a path is computed there.
        expert_shares: how much each expert was used lately.
        host_fused_rows: beside a device, the processor may compute experts, with kernels for so many rows; ``None``: it
            may not.

    Attributes:
        plan: which units there are, and which of them stay.
        streamer: brings the streamed units; ``None`` if all are resident.
        bank: brings experts as they are routed to; ``None`` if there are none, or they come with their block.
        head: the output projection; ``None``: another device has it.
        resident_bytes: what is resident, in the compute dtype.
        on_unit: told the weight bytes of each unit that was computed; may raise to abandon the sweep.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: UnitPlan,
        reader: DirectReader,
        on_load: OnBytes,
        fused_rows: Mapping[str, int] | None = None,
        device: Device | None = None,
        computes: Callable[[str], bool] = lambda path: True,
        expert_shares: Sequence[float] = (),
        host_fused_rows: Mapping[str, int] | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._device = device
        self._computes = computes
        self._matrices = Matrices(skeleton, fused_rows or {}, None if device is None else device.torch_device)
        self._staying: dict[int, Weights] = {}
        self.plan = plan
        self._layouts = [lay_out(unit.name, self._parts(unit)) for unit in plan.units]
        self._resident: dict[int, dict[str, torch.Tensor]] = {}
        self.resident_bytes = 0
        self.on_unit: OnBytes = lambda num_bytes: None
        self._timeline: Timeline | None = None
        streamed = [index for index in range(len(plan.units)) if index not in plan.residents]
        self._stream_index = {index: position for position, index in enumerate(streamed)}
        self.streamer: Streamer | None = None
        self.bank: AnyBank | None = None
        try:
            if streamed:
                feed = self._feed(streamed, reader, on_load)
                feed.populate()
                self.streamer = Streamer(feed, num_cycle=sum(index < len(plan.body) for index in streamed))
            if plan.expert_slots:
                self.bank = install_experts(
                    skeleton, plan, self._matrices, reader, expert_shares, device, host_fused_rows
                )
            self._joined = self._find_joined()
            for index in sorted(plan.residents):
                self._load(index, reader, on_load)
            if self.bank is not None:
                self.bank.load_hottest(on_load)
            if device is not None:
                self._move_buffers(device.torch_device)
            self._install()
            head = [self._slice(index) for index in range(len(plan.body), len(plan.units))]
            self.head = SlicedLinear(head) if head else None
        except BaseException:
            self.close()
            raise

    def resident_matrix(self, key: str) -> torch.Tensor | None:
        """The whole tensor *key* of the output projection, if it is resident in one piece."""
        if len(self.plan.head) == 1 and key == self._skeleton.head_key and len(self.plan.body) in self._staying:
            matrix, _ = self._staying[len(self.plan.body)]
            return matrix.weight if isinstance(matrix, PlainMatrix) else None
        return None

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

    def _feed(self, streamed: list[int], reader: DirectReader, on_load: OnBytes) -> Feed:
        """Brings the units *streamed* to where they are computed with."""
        layouts = [self._layouts[index] for index in streamed]
        largest = max(layout.num_bytes for layout in layouts)  # a unit strewn over a file has more page ends
        ring_bytes = max(self.plan.ring_bytes, largest)
        if self._device is None:
            return ReadFeed(layouts, ring_bytes, reader)
        stays = {position for position, index in enumerate(streamed) if index in self.plan.host_residents}
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

    def _load(self, index: int, reader: DirectReader, on_load: OnBytes) -> None:
        unit = self.plan.units[index]
        self.resident_bytes += unit.compute_bytes
        if index < len(self.plan.body) and not self._is_sliced(unit):
            self._resident[index] = self._matrices.converted(self._loaded(self._layouts[index], reader, on_load))
            return
        group = self._joined.get(index, [index])
        if index == group[0]:
            units = {self.plan.units[member].name: member for member in group}
            self._staying[index] = self._matrices.staying(
                [self.plan.units[member] for member in group],
                lambda unit: self._loaded(self._layouts[units[unit.name]], reader, on_load),
            )

    def _find_joined(self) -> dict[int, list[int]]:
        """For resident Linears that take the same input and may be one matrix: all of them."""
        body = [index for index in self.plan.residents if index < len(self.plan.body)]
        by_path = {self.plan.units[index].module: index for index in body if self._is_sliced(self.plan.units[index])}
        found: dict[int, list[int]] = {}
        for parent in {path.rpartition(".")[0] for path in by_path}:
            for names in SAME_INPUT:
                group = [by_path[path] for name in names if (path := f"{parent}.{name}") in by_path]
                if len(group) == len(names) and self._matrices.can_join([self.plan.units[index] for index in group]):
                    found |= dict.fromkeys(group, group)
        return found

    def _is_sliced(self, unit: PlannedUnit) -> bool:
        """Whether it is a Linear, or rows of one, that computes slice by slice."""
        is_packed = isinstance(self._skeleton.sources.get(f"{unit.module}.weight"), PackedSource)
        return unit.rows is not None or (is_packed and unit.decode_bytes > 0)

    def _install(self) -> None:
        """Hang the body's units onto their modules."""
        wrapped = self._install_joined()
        body = enumerate(self.plan.body)
        for (path, is_sliced), group in groupby(body, key=lambda item: (item[1].module, self._is_sliced(item[1]))):
            members = [index for index, _ in group]
            if path in wrapped:
                continue
            module = self._skeleton.model.get_submodule(path)
            unit = self.plan.body[members[0]]
            if is_sliced:
                SlicedLinear([self._slice(index) for index in members]).install(module)
            elif unit.own_only:
                self._binding(unit, module).bind(self._matrices.decoded(unit.module, self._resident[members[0]]))
            else:
                self._install_whole(members[0], module)
            if not unit.own_only:
                wrapped.add(path)
        self._wrap_weightless(wrapped)

    def _install_joined(self) -> set[str]:
        """Have resident Linears with the same input multiply by one matrix; the paths of those that do."""
        found: set[str] = set()
        for group in {id(group): group for group in self._joined.values()}.values():
            paths = [self.plan.units[index].module for index in group]
            rows = [self._matrices.rows(self.plan.units[index])[1] for index in group]
            whole = LinearSlice(0, sum(rows), _Staying(self, self._staying[group[0]], group))
            modules = [self._skeleton.model.get_submodule(path) for path in paths]
            JoinedLinears(SlicedLinear([whole]), rows).install(modules)
            found.update(paths)
        return found

    def _install_whole(self, index: int, module: torch.nn.Module) -> None:
        unit = self.plan.body[index]
        binding = self._binding(unit, module)
        if index in self._resident and not unit.decode_bytes:
            binding.bind(self._matrices.decoded(unit.module, self._resident[index]))
            hooks.wrap(module, lambda: self._present(index), routes=bool(unit.experts))
        else:
            hooks.wrap(module, lambda: self._passing(index, binding), routes=bool(unit.experts))

    def _binding(self, unit: PlannedUnit, module: torch.nn.Module) -> hooks.Binding:
        return hooks.Binding(module, unit.module, self._keys(unit), self._skeleton.dtypes)

    def _wrap_weightless(self, wrapped: set[str]) -> None:
        """Modules outside of every unit (rotary embeddings, activations of a cut MLP) compute by row blocks too."""
        decoder = self._skeleton.decoder
        prefix = self._skeleton.path_of(decoder)
        embedding = self._skeleton.model.get_input_embeddings()
        for path, module in decoder.named_modules(prefix=prefix):
            is_leaf = next(module.children(), None) is None
            inside = any(path == other or path.startswith(f"{other}.") for other in wrapped)
            if is_leaf and not inside and module is not embedding and self._computes(path):
                hooks.wrap(module)

    def _move_buffers(self, device: torch.device) -> None:
        """What is no weight and is real already (frequencies of rotary embeddings)."""
        for path, module in self._skeleton.model.named_modules():
            for name in module._non_persistent_buffers_set if self._computes(path) else ():
                buffer = module._buffers[name]
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def record(self, timeline: Timeline | None) -> None:
        """Have *timeline* told of waits, copies and compute; ``None``: no more."""
        self._timeline = timeline
        if self.streamer is not None:
            self.streamer.record(timeline)
        if self.bank is not None:
            self.bank.timeline = timeline

    def _begin(self) -> Mark | float:
        """Compute with a unit begins; for :meth:`_finish`."""
        if self._timeline is None or self._device is None:
            return time.perf_counter()
        mark = self._device.compute.mark(timed=True)
        self._timeline.set_base(mark)
        return mark

    def _finish(self, index: int, began: Mark | float) -> None:
        """A unit was computed."""
        layout = self._layouts[index]
        self.on_unit(layout.weight_bytes)
        if self._timeline is None:
            return
        if isinstance(began, float | int):
            self._timeline.add("compute", layout.name, began, time.perf_counter(), layout.weight_bytes)
        elif self._device is not None:
            stop = self._device.compute.mark(timed=True)
            self._timeline.add_marks("compute", layout.name, began, stop, layout.weight_bytes)

    @contextmanager
    def _present(self, index: int) -> Iterator[None]:
        began = self._begin()
        yield
        self._finish(index, began)

    @contextmanager
    def _passing(self, index: int, binding: hooks.Binding) -> Iterator[None]:
        with self._stored(index) as tensors:
            binding.bind(self._matrices.decoded(self.plan.units[index].module, tensors))
            try:
                yield
            finally:
                binding.unbind()

    @contextmanager
    def _stored(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of a unit, resident or streamed, as they are stored."""
        if index in self._resident:
            began = self._begin()
            yield self._resident[index]
            self._finish(index, began)
            return
        assert self.streamer is not None
        position = self._stream_index[index]
        tensors = self.streamer.acquire(position)
        began = self._begin()
        yield tensors
        self.streamer.release(position)  # not after an error: the sweep is aborted as a whole
        self._finish(index, began)

    def _slice(self, index: int) -> LinearSlice:
        rows = self._matrices.rows(self.plan.units[index])
        if index in self._staying:
            return LinearSlice(*rows, _Staying(self, self._staying[index], [index]))
        return LinearSlice(*rows, lambda: self._slice_weights(index))

    @contextmanager
    def _slice_weights(self, index: int) -> Iterator[Weights]:
        with self._stored(index) as stored:
            yield self._matrices.passing(self.plan.units[index], stored)


class _Staying:
    """The context of weights that never leave; *units* are counted when they were computed."""

    def __init__(self, owner: DeviceWeights, weights: Weights, units: list[int]) -> None:
        self._owner = owner
        self._weights = weights
        self._units = units
        self._began: Mark | float = 0.0

    def __call__(self) -> _Staying:
        return self

    def __enter__(self) -> Weights:
        self._began = self._owner._begin()
        return self._weights

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for index in self._units:
                self._owner._finish(index, self._began)

"""Joins a plan with a skeleton: every unit becomes resident or streams, and its modules know which.

Lifetimes: resident tensors live as long as this object; streamed ones are views into the ring, bound when their
module runs and unbound right after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch

from layerstream.model import hooks
from layerstream.model.linear import LinearSlice, SlicedLinear
from layerstream.model.skeleton import Skeleton
from layerstream.streaming.loader import load_unit
from layerstream.streaming.reader import DirectReader
from layerstream.streaming.residency import PlannedUnit, UnitPlan
from layerstream.streaming.streamer import Streamer
from layerstream.streaming.unit import Part, lay_out

OnBytes = Callable[[int], None]


class ModelWeights:
    """The weights of a model under a plan.

    Attributes:
        plan: which units there are, and which of them stay.
        streamer: brings the streamed units; ``None`` if all are resident.
        head: the output projection.
        resident_bytes: what is resident, in the compute dtype.
        on_unit: told the weight bytes of each unit that was computed; may raise to abandon the sweep.
    """

    def __init__(self, skeleton: Skeleton, plan: UnitPlan, reader: DirectReader, on_load: OnBytes) -> None:
        self._skeleton = skeleton
        self.plan = plan
        self._layouts = [lay_out(unit.name, self._parts(unit)) for unit in plan.units]
        self._resident: dict[int, dict[str, torch.Tensor]] = {}
        self.resident_bytes = 0
        self.on_unit: OnBytes = lambda num_bytes: None
        streamed = [index for index in range(len(plan.units)) if index not in plan.residents]
        self._stream_index = {index: position for position, index in enumerate(streamed)}
        self.streamer: Streamer | None = None
        if streamed:
            layouts = [self._layouts[index] for index in streamed]
            num_cycle = sum(index < len(plan.body) for index in streamed)
            largest = max(layout.num_bytes for layout in layouts)  # a unit strewn over a file has more page ends
            self.streamer = Streamer(layouts, num_cycle, max(plan.ring_bytes, largest), reader)
            self.streamer.populate()
        for index in sorted(plan.residents):
            self._load(index, reader, on_load)
        self._install()
        self.head = SlicedLinear([self._slice(index) for index in range(len(plan.body), len(plan.units))])

    def resident_matrix(self, key: str) -> torch.Tensor | None:
        """The whole tensor *key* of the output projection, if it is resident in one piece."""
        if len(self.plan.head) == 1 and len(self.plan.body) in self._resident:
            return self._resident[len(self.plan.body)].get(key)
        return None

    def load_matrix(self, key: str, reader: DirectReader) -> torch.Tensor:
        """Load one more tensor to stay, in its compute dtype."""
        layout = lay_out(key, [Part.whole(key, self._skeleton.sources[key])])
        return load_unit(layout, reader)[key].to(self._skeleton.dtypes[key])

    def _parts(self, unit: PlannedUnit) -> list[Part]:
        sources = self._skeleton.sources
        keys = sorted(self._skeleton.keys_of(unit.module, own_only=unit.own_only))
        if unit.rows is None:
            return [Part.whole(key, sources[key]) for key in keys]
        return [Part.of_rows(key, sources[key], *unit.rows) for key in keys]

    def _load(self, index: int, reader: DirectReader, on_load: OnBytes) -> None:
        stored = load_unit(self._layouts[index], reader, on_load)
        tensors = {key: tensor.to(self._skeleton.dtypes[key]) for key, tensor in stored.items()}
        self._resident[index] = tensors
        self.resident_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def _install(self) -> None:
        """Hang the body's units onto their modules."""
        wrapped: set[str] = set()
        body = enumerate(self.plan.body)
        for (path, is_sliced), group in groupby(body, key=lambda item: (item[1].module, item[1].rows is not None)):
            members = [index for index, _ in group]
            module = self._skeleton.model.get_submodule(path)
            unit = self.plan.body[members[0]]
            if is_sliced:
                SlicedLinear([self._slice(index) for index in members]).install(module)
            elif unit.own_only:
                self._binding(unit, module).bind(self._resident[members[0]])
            else:
                self._install_whole(members[0], module)
            if not unit.own_only:
                wrapped.add(path)
        self._wrap_weightless(wrapped)

    def _install_whole(self, index: int, module: torch.nn.Module) -> None:
        binding = self._binding(self.plan.body[index], module)
        if index in self._resident:
            binding.bind(self._resident[index])
            hooks.wrap(module, lambda: self._present(index))
        else:
            hooks.wrap(module, lambda: self._passing(index, binding))

    def _binding(self, unit: PlannedUnit, module: torch.nn.Module) -> hooks.Binding:
        keys = self._skeleton.keys_of(unit.module, own_only=unit.own_only)
        return hooks.Binding(module, unit.module, keys, self._skeleton.dtypes)

    def _wrap_weightless(self, wrapped: set[str]) -> None:
        """Modules outside of every unit (rotary embeddings, activations of a cut MLP) compute by row blocks too."""
        decoder = self._skeleton.decoder
        prefix = self._skeleton.path_of(decoder)
        embedding = self._skeleton.model.get_input_embeddings()
        for path, module in decoder.named_modules(prefix=prefix):
            is_leaf = next(module.children(), None) is None
            inside = any(path == other or path.startswith(f"{other}.") for other in wrapped)
            if is_leaf and not inside and module is not embedding:
                hooks.wrap(module)

    @contextmanager
    def _present(self, index: int) -> Iterator[None]:
        yield
        self.on_unit(self._layouts[index].weight_bytes)

    @contextmanager
    def _passing(self, index: int, binding: hooks.Binding) -> Iterator[None]:
        with self._streamed(index) as tensors:
            binding.bind(tensors)
            try:
                yield
            finally:
                binding.unbind()

    @contextmanager
    def _streamed(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        assert self.streamer is not None
        position = self._stream_index[index]
        yield self.streamer.acquire(position)
        self.streamer.release(position)  # not after an error: the sweep is aborted as a whole
        self.on_unit(self._layouts[index].weight_bytes)

    def _slice(self, index: int) -> LinearSlice:
        unit = self.plan.units[index]
        rows = unit.rows or (0, self._layouts[index].places[f"{unit.module}.weight"].shape[0])
        return LinearSlice(*rows, lambda: self._slice_weights(index, unit.module))

    @contextmanager
    def _slice_weights(self, index: int, path: str) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        dtypes = self._skeleton.dtypes
        weight, bias = f"{path}.weight", f"{path}.bias"
        if index in self._resident:
            tensors = self._resident[index]
            yield tensors[weight], tensors.get(bias)
            self.on_unit(self._layouts[index].weight_bytes)
            return
        with self._streamed(index) as stored:
            tensors = {key: tensor.to(dtypes[key]) for key, tensor in stored.items()}
            yield tensors[weight], tensors.get(bias)

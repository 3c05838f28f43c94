"""Joins a plan with a skeleton: every unit becomes resident or streams, and its modules know which.

Lifetimes: resident tensors live as long as this object; streamed ones are views into the ring, bound when their
module runs and unbound right after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby

import torch

from layerstream.checkpoint.codecs.base import Codec
from layerstream.checkpoint.codecs.tiled import TiledInt4, rewrite, tiled
from layerstream.checkpoint.names import PackedSource
from layerstream.model import hooks
from layerstream.model.linear import LinearSlice, Matrix, PackedMatrix, PlainMatrix, SlicedLinear, tile_rows
from layerstream.model.skeleton import Skeleton
from layerstream.streaming.loader import load_unit
from layerstream.streaming.reader import DirectReader
from layerstream.streaming.residency import PlannedUnit, UnitPlan
from layerstream.streaming.streamer import Streamer
from layerstream.streaming.unit import Part, lay_out

OnBytes = Callable[[int], None]


class ModelWeights:
    """The weights of a model under a plan.

    Args:
        fused_rows: for each kernel that multiplies by quantised weights, the rows it is faster for than decoding them.

    Attributes:
        plan: which units there are, and which of them stay.
        streamer: brings the streamed units; ``None`` if all are resident.
        head: the output projection.
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
    ) -> None:
        self._skeleton = skeleton
        self._fused_rows = fused_rows or {}
        self._rewritten: dict[int, TiledInt4] = {}
        self.plan = plan
        self._layouts = [lay_out(unit.name, self._parts(unit)) for unit in plan.units]
        self._resident: dict[int, dict[str, torch.Tensor]] = {}
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
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
        source = self._skeleton.sources[key]
        parts = list(_packed_parts(source, None)) if isinstance(source, PackedSource) else [Part.whole(key, source)]
        stored = load_unit(lay_out(key, parts), reader)
        return self._decoded(key.rpartition(".")[0], self._converted(stored))[key]

    def _parts(self, unit: PlannedUnit) -> list[Part]:
        sources = self._skeleton.sources
        parts = []
        for key in sorted(self._skeleton.keys_of(unit.module, own_only=unit.own_only)):
            source = sources[key]
            if isinstance(source, PackedSource):
                parts.extend(_packed_parts(source, unit.rows))
            elif unit.rows is None:
                parts.append(Part.whole(key, source))
            else:
                parts.append(Part.of_rows(key, source, *unit.rows))
        return parts

    def _load(self, index: int, reader: DirectReader, on_load: OnBytes) -> None:
        stored = load_unit(self._layouts[index], reader, on_load)
        tensors = self._converted(stored)
        if (target := self._staying_codec(self.plan.units[index])) is not None:
            tensors = self._rewrite(self.plan.units[index], tensors, target)
            self._rewritten[index] = target
        self._resident[index] = tensors
        self.resident_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def _staying_codec(self, unit: PlannedUnit) -> TiledInt4 | None:
        """What the weight of *unit*, which stays, is rewritten to; ``None``: it stays as it is."""
        matrix = self._skeleton.sources.get(f"{unit.module}.weight")
        if not isinstance(matrix, PackedSource):
            return None
        target = tiled(matrix.codec, matrix.shape[-1])
        is_linear = isinstance(self._skeleton.model.get_submodule(unit.module), torch.nn.Linear)
        return target if is_linear and target is not None and self._fuses(target, f"{unit.module}.weight") else None

    def _rewrite(
        self, unit: PlannedUnit, tensors: dict[str, torch.Tensor], target: TiledInt4
    ) -> dict[str, torch.Tensor]:
        """*tensors* of *unit*, with the planes of its weight as they multiply fastest."""
        matrix = self._skeleton.sources[f"{unit.module}.weight"]
        assert isinstance(matrix, PackedSource)
        first, last = unit.rows or (0, matrix.shape[0])
        planes = {name: tensors[plane.name] for name, plane in matrix.planes.items()}
        found = rewrite(matrix.codec, planes, target, last - first, matrix.shape[1])
        stored = {plane.name for plane in matrix.planes.values()}
        others = {key: tensor for key, tensor in tensors.items() if key not in stored}
        return others | {f"{matrix.name}:{name}": plane for name, plane in found.items()}

    def _fuses(self, codec: Codec, key: str) -> int:
        """Rows up to which weight *key* is multiplied by as it is; the kernels compute in bfloat16."""
        return self._fused_rows.get(codec.kernel, 0) if self._skeleton.dtypes[key] == torch.bfloat16 else 0

    def _converted(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the dtypes that they are computed in; planes of quantised matrices as they are."""
        dtypes = self._skeleton.dtypes
        return {key: tensor.to(dtypes[key]) if key in dtypes else tensor for key, tensor in stored.items()}

    def _decoded(self, path: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """*tensors* of the module *path*, what of them is quantised as a whole in the compute dtype."""
        found = dict(tensors)
        for key in self._skeleton.keys_of(path):
            source = self._skeleton.sources[key]
            if isinstance(source, PackedSource) and key not in found:
                planes = {name: found.pop(plane.name) for name, plane in source.planes.items() if plane.name in found}
                if planes:
                    found[key] = torch.empty(source.shape, dtype=self._skeleton.dtypes[key])
                    source.codec.decode(planes, 0, found[key].view(source.matrix_shape))
        return found

    def _is_sliced(self, unit: PlannedUnit) -> bool:
        """Whether it is a Linear, or rows of one, that computes slice by slice."""
        is_packed = isinstance(self._skeleton.sources.get(f"{unit.module}.weight"), PackedSource)
        return unit.rows is not None or (is_packed and unit.decode_bytes > 0)

    def _install(self) -> None:
        """Hang the body's units onto their modules."""
        wrapped: set[str] = set()
        body = enumerate(self.plan.body)
        for (path, is_sliced), group in groupby(body, key=lambda item: (item[1].module, self._is_sliced(item[1]))):
            members = [index for index, _ in group]
            module = self._skeleton.model.get_submodule(path)
            unit = self.plan.body[members[0]]
            if is_sliced:
                SlicedLinear([self._slice(index) for index in members]).install(module)
            elif unit.own_only:
                self._binding(unit, module).bind(self._decoded(unit.module, self._resident[members[0]]))
            else:
                self._install_whole(members[0], module)
            if not unit.own_only:
                wrapped.add(path)
        self._wrap_weightless(wrapped)

    def _install_whole(self, index: int, module: torch.nn.Module) -> None:
        unit = self.plan.body[index]
        binding = self._binding(unit, module)
        if index in self._resident and not unit.decode_bytes:
            binding.bind(self._decoded(unit.module, self._resident[index]))
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
        with self._stored(index) as tensors:
            binding.bind(self._decoded(self.plan.units[index].module, tensors))
            try:
                yield
            finally:
                binding.unbind()

    @contextmanager
    def _stored(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of a unit, resident or streamed, as they are stored."""
        if index in self._resident:
            yield self._resident[index]
            self.on_unit(self._layouts[index].weight_bytes)
            return
        assert self.streamer is not None
        position = self._stream_index[index]
        yield self.streamer.acquire(position)
        self.streamer.release(position)  # not after an error: the sweep is aborted as a whole
        self.on_unit(self._layouts[index].weight_bytes)

    def _slice(self, index: int) -> LinearSlice:
        unit = self.plan.units[index]
        rows = unit.rows or (0, self._skeleton.sources[f"{unit.module}.weight"].shape[0])
        return LinearSlice(*rows, lambda: self._slice_weights(index, unit.module, rows))

    @contextmanager
    def _slice_weights(
        self, index: int, path: str, rows: tuple[int, int]
    ) -> Iterator[tuple[Matrix, torch.Tensor | None]]:
        with self._stored(index) as stored:
            yield self._matrix(self._converted(stored), path, rows, self._rewritten.get(index))

    def _matrix(
        self, tensors: dict[str, torch.Tensor], path: str, rows: tuple[int, int], rewritten: TiledInt4 | None
    ) -> tuple[Matrix, torch.Tensor | None]:
        weight, bias = f"{path}.weight", self._bias(tensors, f"{path}.bias", rows)
        source = self._skeleton.sources[weight]
        if not isinstance(source, PackedSource):
            return PlainMatrix(tensors[weight]), bias
        codec = rewritten or source.codec
        if rewritten:
            planes = {name: tensors[f"{source.name}:{name}"] for name in rewritten.expected(*source.shape)}
        else:
            planes = {name: tensors[plane.name] for name, plane in source.planes.items()}
        scratch = self._scratch_for(self._skeleton.dtypes[weight])
        return PackedMatrix(codec, planes, *rows, source.shape[1], scratch, self._fuses(codec, weight)), bias

    def _bias(self, tensors: dict[str, torch.Tensor], key: str, rows: tuple[int, int]) -> torch.Tensor | None:
        """Of *rows* of a Linear; ``None`` if it has none."""
        source = self._skeleton.sources.get(key)
        if not isinstance(source, PackedSource):
            return tensors.get(key)
        planes = {name: tensors[plane.name] for name, plane in source.planes.items()}
        bias = torch.empty((rows[1] - rows[0], 1), dtype=self._skeleton.dtypes[key])
        source.codec.decode(planes, rows[0], bias)
        return bias.view(-1)

    def _scratch_for(self, dtype: torch.dtype) -> torch.Tensor:
        """Room for the largest tile, one for all."""
        if dtype not in self._scratch:
            sources = self._skeleton.sources.values()
            packed = [source for source in sources if isinstance(source, PackedSource) and len(source.shape) == 2]
            codecs = [(tiled(source.codec, source.shape[1]) or source.codec, source.shape) for source in packed]
            codecs += [(source.codec, source.shape) for source in packed]
            values = max(tile_rows(codec, *shape) * shape[1] for codec, shape in codecs)
            self._scratch[dtype] = torch.empty(values, dtype=dtype)
        return self._scratch[dtype]


def _packed_parts(source: PackedSource, rows: tuple[int, int] | None) -> Iterator[Part]:
    """The planes of *source*, or of *rows* of it."""
    num_rows = source.shape[0]
    for name, plane in source.planes.items():
        if rows is None or name in source.codec.whole:
            yield Part.whole(plane.name, plane)
        else:
            start, stop = (plane.num_bytes * row // num_rows for row in rows)
            count = (stop - start) // (plane.num_bytes // plane.shape[0])
            yield Part(plane.name, plane, (count, *plane.shape[1:]), start, stop)

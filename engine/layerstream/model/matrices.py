"""From the stored tensors of a Linear to what its input is multiplied by: as it is, rewritten for a kernel, decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import torch

from layerstream.checkpoint.codecs.base import Codec
from layerstream.checkpoint.codecs.bnb import aligned
from layerstream.checkpoint.codecs.tiled import TILE, TiledInt4, rewrite, staying_shapes, tiled
from layerstream.checkpoint.names import PackedSource, ParameterSource, Source
from layerstream.core.sizes import PAGE
from layerstream.hardware.accelerators import accelerator_of
from layerstream.hardware.arena import Arena
from layerstream.model.experts import EXPERT_ROWS, FusedMatrix, PackedExperts
from layerstream.model.linear import Matrix, PackedMatrix, PlainMatrix, tile_rows
from layerstream.model.skeleton import Skeleton
from layerstream.planner.units import PlannedUnit
from layerstream.streaming.layout import Part

Tensors = Mapping[str, torch.Tensor]
Weights = tuple[Matrix, torch.Tensor | None]
"""Weight and bias."""


class Matrices:
    """Makes matrices for the Linears of *skeleton*.

    Args:
        fused_rows: for each kernel that multiplies by quantised weights, the rows it is faster for than decoding them.
        device: what computes with them.
    """

    def __init__(self, skeleton: Skeleton, fused_rows: Mapping[str, int], device: torch.device | None = None) -> None:
        self._skeleton = skeleton
        self._device = device or torch.device("cpu")
        self._fused_rows = fused_rows
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._device_rows: dict[tuple[Codec, tuple[int, int], torch.dtype], int] = {}
        self._experts: dict[tuple[str, int, int, torch.dtype], torch.Tensor] = {}

    def passing(self, unit: PlannedUnit, tensors: Tensors) -> Weights:
        """Of a unit that streams, out of its *tensors* as they are stored."""
        source, bias = self._source(unit), self._bias(unit, tensors)
        if not isinstance(source, PackedSource):
            return PlainMatrix(self.converted(tensors)[_weight(unit)]), bias
        planes = {name: tensors[plane.name] for name, plane in source.planes.items()}
        first, last = self.rows(unit)
        scratch = self._scratch_for(_weight(unit))
        fused_rows = self._fused(source, planes, (first, last), _weight(unit))
        return PackedMatrix(source.codec, planes, first, last, source.shape[1], scratch, fused_rows), bias

    def staying(self, units: Sequence[PlannedUnit], load: Callable[[PlannedUnit], Tensors]) -> Weights:
        """Of a unit that is resident, decoded if the plan has room for that, else as it multiplies fastest; of several
        that :meth:`can_join`, one matrix with the rows of all."""
        target = self._staying_codec(units[0])
        if target is None:
            (unit,) = units
            return self._staying_as_it_is(unit, load(unit))
        columns, sizes = self._source(units[0]).shape[1], [self._num_rows(unit) for unit in units]
        planes = self._allocate(staying_shapes(target, sum(sizes), columns))
        biases: list[torch.Tensor | None] = []
        row = 0
        for unit, num_rows in zip(units, sizes, strict=True):
            source, stored = self._source(unit), load(unit)
            assert isinstance(source, PackedSource)
            own = {name: stored[plane.name] for name, plane in source.planes.items()}
            rewrite(source.codec, own, target.cut(planes, sum(sizes), row, row + num_rows), num_rows, columns)
            biases.append(self._bias(unit, stored))
            row += num_rows
        weight = _weight(units[0])
        fused_rows, scratch = self._most_rows(target.kernel, weight), self._scratch_for(weight)
        matrix = PackedMatrix(target, planes, 0, row, columns, scratch, fused_rows)
        if all(bias is None for bias in biases):
            return matrix, None
        filled = [scratch.new_zeros(n) if bias is None else bias for n, bias in zip(sizes, biases, strict=True)]
        return matrix, torch.cat(filled)

    def can_join(self, units: Sequence[PlannedUnit]) -> bool:
        """Whether resident *units*, which take the same input, may be one matrix."""
        forms = {(self._staying_codec(unit), self._source(unit).shape[1]) for unit in units}
        aligned = all(unit.rows is None and self._num_rows(unit) % TILE == 0 for unit in units)
        return aligned and len(forms) == 1 and next(iter(forms))[0] is not None

    def _staying_codec(self, unit: PlannedUnit) -> TiledInt4 | None:
        """What a resident *unit* is rewritten to; ``None``: it stays as it is stored, or decoded."""
        source = self._source(unit)
        target = tiled(source.codec, source.shape[1]) if isinstance(source, PackedSource) else None
        can = target is not None and not unit.stays_decoded and self._most_rows(target.kernel, _weight(unit))
        return target if can else None

    def _staying_as_it_is(self, unit: PlannedUnit, tensors: Tensors) -> Weights:
        if not isinstance(self._source(unit), PackedSource):
            return self.passing(unit, tensors)
        if not unit.stays_decoded:
            return self.passing(unit, {name: aligned(tensor) for name, tensor in tensors.items()})
        matrix, bias = self.passing(unit, tensors)
        assert isinstance(matrix, PackedMatrix)
        shape = self._num_rows(unit), self._source(unit).shape[1]
        values = self._allocate({"weight": (self._skeleton.dtypes[_weight(unit)], shape)})["weight"]
        for start, stop, tile in matrix.tiles(in_order=True):
            values[start:stop] = tile
        return PlainMatrix(values), bias

    def _num_rows(self, unit: PlannedUnit) -> int:
        first, last = self.rows(unit)
        return last - first

    def rows(self, unit: PlannedUnit) -> tuple[int, int]:
        """The rows of the matrix that *unit* has."""
        return unit.rows or (0, self._source(unit).shape[0])

    def converted(self, stored: Tensors) -> dict[str, torch.Tensor]:
        """In the dtypes that they are computed in; planes of quantised matrices as they are."""
        dtypes = self._skeleton.dtypes
        return {key: tensor.to(dtypes[key]) if key in dtypes else tensor for key, tensor in stored.items()}

    def decoded(self, path: str, tensors: Tensors) -> dict[str, torch.Tensor | PackedExperts]:
        """*tensors* of the module *path*, what of them is quantised in the compute dtype, but for experts: of them
        those that are wanted will be decoded."""
        found: dict[str, torch.Tensor | PackedExperts] = dict(tensors)
        for key in self._skeleton.keys_of(path):
            source = self._skeleton.sources[key]
            if isinstance(source, PackedSource) and key not in found:
                present = [(name, plane.name) for name, plane in source.planes.items() if plane.name in found]
                planes = {name: tensors[stored] for name, stored in present}
                for _, stored in present:
                    del found[stored]
                if planes and len(source.shape) == 3:
                    is_fused = self._fuses_expert(key, source)
                    found[key] = PackedExperts(source, planes, self._expert_for(key, source), is_fused=is_fused)
                elif planes:
                    values = torch.empty(source.shape, dtype=self._skeleton.dtypes[key], device=self._device)
                    found[key] = values
                    source.codec.decode(planes, 0, values.view(source.matrix_shape))
        return found

    def experts(self, path: str) -> Callable[[int, Tensors], dict[str, torch.Tensor | FusedMatrix]]:
        """Makes, of one of the experts *path* and its tensors as they are stored, matrices and biases by the names of
        their parameters; what was quantised is valid until another expert is asked for."""
        plain: list[tuple[str, str, torch.dtype]] = []
        packed: list[tuple[str, PackedSource, Codec | None, torch.Tensor, bool]] = []
        for key in self._skeleton.expert_keys(path):
            source, name = self._skeleton.sources[key], key.rpartition(".")[2]
            if isinstance(source, PackedSource):
                codec = source.codec.one_of(source.shape[0])
                is_fused = codec is not None and self._fuses_expert(key, source)
                packed.append((name, source, codec, self._expert_for(key, source), is_fused))
            else:
                plain.append((name, key, self._skeleton.dtypes[key]))

        def make(expert: int, stored: Tensors) -> dict[str, torch.Tensor | FusedMatrix]:
            found: dict[str, torch.Tensor | FusedMatrix] = {name: stored[key][0].to(to) for name, key, to in plain}
            for name, source, codec, scratch, is_fused in packed:
                planes = {plane: stored[part.name] for plane, part in source.planes.items()}
                if is_fused and codec is not None:
                    found[name] = FusedMatrix(codec, planes, len(scratch))
                    continue
                (codec or source.codec).decode(planes, 0 if codec else expert * len(scratch), scratch)
                found[name] = scratch.T if source.codec.transposes else scratch
            return found

        return make

    def _fuses_expert(self, key: str, source: PackedSource) -> bool:
        """Whether a kernel multiplies by an expert's matrix of *source* as it is stored."""
        module = self._skeleton.model.get_submodule(key.rpartition(".")[0])
        return not module.is_transposed and self._most_rows(source.codec.kernel, key) >= EXPERT_ROWS

    def _allocate(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
        """Memory for tensors that stay; on the host outside of the heap, where others' would leave holes."""
        if accelerator_of(self._device) is not None:
            return {n: torch.empty(shape, dtype=dtype, device=self._device) for n, (dtype, shape) in shapes.items()}
        sizes = {name: -(-prod(shape) * dtype.itemsize // PAGE) * PAGE for name, (dtype, shape) in shapes.items()}
        arena, found, start = Arena(sum(sizes.values())), {}, 0
        for name, (dtype, shape) in shapes.items():
            num_bytes = prod(shape) * dtype.itemsize
            found[name] = arena.tensor[start : start + num_bytes].view(dtype).view(shape)
            start += sizes[name]
        return found

    def _source(self, unit: PlannedUnit) -> Source:
        return self._skeleton.sources[_weight(unit)]

    def _most_rows(self, kernel: str, weight: str) -> int:
        """Of a row block that *kernel* multiplies; the kernels compute in bfloat16."""
        return self._fused_rows.get(kernel, 0) if self._skeleton.dtypes[weight] == torch.bfloat16 else 0

    def _fused(
        self, source: PackedSource, planes: Mapping[str, torch.Tensor], rows: tuple[int, int], weight: str
    ) -> int:
        """The most rows of a row block that *rows* of *source* are multiplied by as they are stored."""
        if accelerator_of(self._device) is None:
            return self._most_rows(source.codec.kernel, weight)
        shape, dtype = (rows[1] - rows[0], source.shape[1]), self._skeleton.dtypes[weight]
        kind = source.codec, shape, dtype
        if kind not in self._device_rows:
            self._device_rows[kind] = source.codec.device_rows(planes, rows[0], shape, dtype)
        return self._device_rows[kind]

    def _bias(self, unit: PlannedUnit, tensors: Tensors) -> torch.Tensor | None:
        """Of the rows of *unit*; ``None`` if it has none."""
        key = f"{unit.module}.bias"
        source = self._skeleton.sources.get(key)
        if source is None:
            return None
        if not isinstance(source, PackedSource):
            return tensors[key].to(self._skeleton.dtypes[key])
        first, last = self.rows(unit)
        planes = {name: tensors[plane.name] for name, plane in source.planes.items()}
        bias = torch.empty((last - first, 1), dtype=self._skeleton.dtypes[key], device=self._device)
        source.codec.decode(planes, first, bias)
        return bias.view(-1)

    def _expert_for(self, key: str, source: PackedSource) -> torch.Tensor:
        """Room for an expert's matrix, one for all layers."""
        rows, columns = source.matrix_shape
        place = key.rpartition(".")[2], rows // source.shape[0], columns, self._skeleton.dtypes[key]
        if place not in self._experts:
            self._experts[place] = torch.empty(place[1:3], dtype=place[3], device=self._device)
        return self._experts[place]

    def _scratch_for(self, weight: str) -> torch.Tensor:
        """Room for the largest tile, one for all weights of a dtype."""
        dtype = self._skeleton.dtypes[weight]
        if dtype not in self._scratch:
            sources = self._skeleton.sources.values()
            packed = [source for source in sources if isinstance(source, PackedSource) and len(source.shape) == 2]
            codecs = [(codec, source.shape) for source in packed for codec in _codecs(source)]
            most = self._skeleton.tile_values
            size = max(tile_rows(codec, rows, columns, most) * columns for codec, (rows, columns) in codecs)
            self._scratch[dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return self._scratch[dtype]


def packed_parts(source: PackedSource, rows: tuple[int, int] | None) -> Iterator[Part]:
    """The planes of *source*, or of *rows* of it."""
    num_rows = source.shape[0]
    for name, plane in source.planes.items():
        if rows is None or name in source.codec.whole:
            yield Part.whole(plane.name, plane)
        else:
            yield plane_rows(plane, num_rows, *rows)


def expert_parts(source: Source, key: str, expert: int) -> Iterator[Part]:
    """The part of *source*, a parameter ``(experts, …)``, that is one expert's."""
    if not isinstance(source, PackedSource):
        yield Part.of_rows(key, source, expert, expert + 1)
        return
    can_cut = source.codec.one_of(source.shape[0]) is not None
    for name, plane in source.planes.items():
        if name in source.codec.whole and not can_cut:
            yield Part.whole(plane.name, plane)
        else:
            yield plane_rows(plane, source.shape[0], expert, expert + 1)


def plane_rows(plane: ParameterSource, num_rows: int, first: int, last: int) -> Part:
    """Of *plane*, whose bytes belong to *num_rows* in equal shares, those of rows ``[first, last)``."""
    start, stop = (plane.num_bytes * row // num_rows for row in (first, last))
    count = (stop - start) // (plane.num_bytes // plane.shape[0])
    return Part(plane.name, plane, (count, *plane.shape[1:]), start, stop)


def _codecs(source: PackedSource) -> list[Codec]:
    target = tiled(source.codec, source.shape[1])
    return [source.codec] if target is None else [source.codec, target]


def _weight(unit: PlannedUnit) -> str:
    return f"{unit.module}.weight"

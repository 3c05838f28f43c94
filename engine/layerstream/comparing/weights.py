"""The values of a checkpoint's tensors, by name: whole, one at a time, by other ways than the engine's.

What the engine streams, cuts, joins, rewrites for kernels and decodes by tiles is here read by the safetensors library
and decoded at once. What both share: which files count, how a quantised matrix is found among them and decoded
(:mod:`layerstream.checkpoint.packed`, ``Codec.decode``); of a GGUF file also which parameter each tensor is. A fault
there is on both sides, and no comparison shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from layerstream.checkpoint.codecs.base import Codec, matrix_shape
from layerstream.checkpoint.folder import Checkpoint
from layerstream.checkpoint.header import TensorEntry
from layerstream.checkpoint.names import PLANE_DTYPES, PackedSource, ParameterSource, Source
from layerstream.checkpoint.packed import PackedTensor


class Weights(Protocol):
    """Tensors by the names that the files have for them; *are_parameters*: which are those of the model already."""

    are_parameters: bool

    @property
    def names(self) -> Collection[str]:
        """What there is."""
        ...

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Some of them; what was quantised in fp32."""
        ...


class FolderWeights:
    """Those of a folder of safetensors files."""

    are_parameters = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stored: dict[str, TensorEntry | PackedTensor] = {**checkpoint.tensors, **checkpoint.packed}

    @property
    def names(self) -> Collection[str]:
        """As the files have them."""
        return self._stored.keys()

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """By the safetensors library, which maps files into memory: each until its tensors are gone."""
        opened = cache(_open)
        return {name: self._read(self._stored[name], opened) for name in names}

    def _read(self, found: TensorEntry | PackedTensor, opened: Callable[[Path], Any]) -> torch.Tensor:
        if isinstance(found, PackedTensor):
            planes = {name: self._read(entry, opened).view(entry.shape) for name, entry in found.planes.items()}
            return decode(found.codec, planes, found.shape)
        tensor = opened(found.extent.path).get_tensor(found.name)
        dtype = PLANE_DTYPES.get(found.dtype)
        return tensor if dtype is None or tensor.dtype == dtype else tensor.view(dtype)


class GgufWeights:
    """Those of a GGUF file, by the names of the parameters that *sources* says they are."""

    are_parameters = True

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    @property
    def names(self) -> Collection[str]:
        """The model's parameters."""
        return self._sources.keys()

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Plain reads; decoded by the codec."""
        return {name: _read_source(self._sources[name]) for name in names}


def decode(codec: Codec, planes: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The values of a parameter of *shape*, in fp32."""
    values = torch.empty(matrix_shape(codec, shape))
    codec.decode(planes, 0, values)
    if not codec.transposes:
        return values.view(shape)
    return values.view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _read_source(source: Source) -> torch.Tensor:
    if not isinstance(source, PackedSource):
        return _read_plane(source)
    return decode(source.codec, {name: _read_plane(plane) for name, plane in source.planes.items()}, source.shape)


def _read_plane(source: ParameterSource) -> torch.Tensor:
    stored = bytearray(source.num_bytes)
    for piece in source.pieces:
        with piece.entry.extent.path.open("rb") as file:
            file.seek(piece.entry.extent.offset + piece.source_offset)
            stored[piece.destination_offset : piece.destination_offset + piece.num_bytes] = file.read(piece.num_bytes)
    return torch.frombuffer(stored, dtype=source.dtype).view(source.shape)

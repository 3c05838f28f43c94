"""Writes a safetensors file tensor by tensor, in bounded memory, and puts it in place as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from layerstream.checkpoint.header import stored_bytes
from layerstream.checkpoint.names import DTYPES
from layerstream.errors import StorageFull

SYNCED_BYTES = 64 * 2**20
ALIGNMENT = 64
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls *dtype*."""
    return _NAMES[dtype]


class ShardWriter:
    """One safetensors file on its way. Use as a context: leaving it without an error puts the file in place.

    Args:
        shapes: dtype name and shape of each tensor, in the order in which they will be written. In the file, those
            that are multiples of 64 bytes come first, so that each begins at one: kernels want aligned weights.

    Raises:
        StorageFull: there is no room; what was written of the file is removed.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        sizes = {name: stored_bytes(dtype, shape) for name, (dtype, shape) in shapes.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in sorted(shapes, key=lambda name: sizes[name] % ALIGNMENT > 0):
            starts[name], end = end, end + sizes[name]
            dtype, shape = shapes[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
        raw = json.dumps(header).encode()
        self._header = raw + b" " * (-(len(raw) + 8) % ALIGNMENT)
        self._left = [(name, 8 + len(self._header) + starts[name], sizes[name]) for name in shapes]

    def __enter__(self) -> ShardWriter:
        self._file = self._partial.open("wb")
        self._unsynced = 0
        self._put(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def write(self, name: str, parts: Iterable[torch.Tensor | bytes]) -> None:
        """The next tensor, in any number of *parts*, each contiguous."""
        expected, offset, size = self._left.pop(0)
        assert name == expected, f"{name} written where {expected} is due"
        self._file.seek(offset)
        for part in parts:
            data = part if isinstance(part, bytes) else part.contiguous().view(-1).view(torch.uint8).numpy().data
            size -= len(data)
            self._put(data)
        assert size == 0, f"{name}: {size} bytes are missing"

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
            self._unsynced += len(data)
            if self._unsynced >= SYNCED_BYTES:
                self._sync()
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise StorageFull(f"{self._path}: the disk is full; free some room and start again") from error
            raise

    def _sync(self) -> None:
        """Have it on the disk and out of the page cache, which would count as this process's memory in a cgroup."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        assert not self._left, f"{self._left[0][0]} was not written"
        self._sync()
        self._file.close()
        self._partial.replace(self._path)

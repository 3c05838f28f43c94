"""A segment: the file that a run of pages lies in. Format only; who writes and reads when is others' business.

Layer-major, so that one layer of consecutive pages is one contiguous read, and a writer only ever appends::

    layer 0: page 0 | page 1 | …      each page-layer is encoded by the codec and padded to 4 KiB
    layer 1: page 0 | page 1 | …
    …
    footer:  JSON, then a trailer of fixed size: magic, version, CRC-32 and length of the JSON

A *snapshot*, the states of recurrent layers after a page, is a segment of one page of one token: its key follows from
the page's (:func:`~layerstream.kv.keys.snapshot_key`), and that page is its parent.

The footer says all that is needed to use the pages, and the index can be rebuilt from it: namespace, keys, the parent
of the first page, shapes, codec, and a CRC-32 for every page-layer. A segment is written under a temporary name,
synced, renamed and the folder synced; after that its bytes never change. Footers are hostile input: every count is
checked against the file's length before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from layerstream.core.sizes import PAGE as ALIGNMENT
from layerstream.errors import LayerStreamError
from layerstream.hardware.files import temporary_path
from layerstream.kv.shape import ITEM_BYTES, PageShape

VERSION = 1
MAX_PAGES = 64
SNAPSHOT_TOKENS = 1  # ``page_tokens`` of a segment that keeps states of recurrent layers; pages have more
SUFFIX = ".kv"
_MAGIC = b"LSKVPAGE"
_TRAILER = struct.Struct("<8sIIQ")
_MAX_FOOTER = 2**24
_BLOCK_BYTES = 2 * 2**20

Key = bytes
Buffers = Sequence[memoryview]


class DamagedSegment(LayerStreamError):
    """A segment whose bytes are not what was written; callers recompute its pages and users never see this."""


@dataclass(frozen=True)
class SegmentInfo:
    """What a footer says.

    Attributes:
        namespace: what the keys are keys of: model, arithmetic, tenant.
        keys: page keys in order; the first page's parent is ``parent``, empty at position 0.
        codec: how page-layers are encoded; ``encoded_bytes`` is the length of one, per layer, before padding.
        shapes: what each layer keeps.
        checksums: CRC-32 of page-layers, ``checksums[layer][page]``.
        seconds: what computing the pages took.
    """

    namespace: str
    keys: tuple[Key, ...]
    parent: Key
    page_tokens: int
    codec: str
    encoded_bytes: tuple[int, ...]
    shapes: tuple[PageShape, ...]
    checksums: tuple[tuple[int, ...], ...]
    seconds: float

    @property
    def name(self) -> str:
        """The file's name: it says the contents, so whoever writes the same pages writes the same file."""
        return f"{self.keys[0].hex()[:16]}-{self.keys[-1].hex()[:32]}{SUFFIX}"

    @cached_property
    def layer_offsets(self) -> tuple[int, ...]:
        """Where each layer begins; one more entry for the end of the last."""
        offsets = [0]
        for size in self.encoded_bytes:
            offsets.append(offsets[-1] + padded(size) * len(self.keys))
        return tuple(offsets)

    @property
    def is_snapshot(self) -> bool:
        """Whether it keeps states of recurrent layers after the page ``parent``."""
        return self.page_tokens == SNAPSHOT_TOKENS

    def parents(self) -> tuple[Key, ...]:
        """The parent of each page."""
        return (self.parent, *self.keys[:-1])


def padded(num_bytes: int) -> int:
    """*num_bytes* rounded up to the alignment of direct reads."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class SegmentWriter:
    """Appends layer after layer to a temporary file; ``commit`` makes it a segment, leaving without it removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = temporary_path(folder / "segment")
        self._file = _DirectFile(self._path)
        self.checksums: list[tuple[int, ...]] = []
        self.encoded_bytes: list[int] = []

    def write_layer(self, pages: Iterable[Buffers]) -> None:
        """Append one layer's page-layers, each a few buffers, all of the same length."""
        checksums, sizes = [], set()
        for buffers in pages:
            checksum, size = 0, 0
            for buffer in buffers:
                checksum = zlib.crc32(buffer, checksum)
                size += len(buffer)
                self._file.write(buffer)
            self._file.write(memoryview(bytes(padded(size) - size)))
            checksums.append(checksum)
            sizes.add(size)
        assert len(sizes) == 1, "page-layers of one layer have one length"
        self.checksums.append(tuple(checksums))
        self.encoded_bytes.append(sizes.pop())

    def commit(self, info: SegmentInfo) -> int:
        """Append the footer, sync, rename into place, sync the folder; the file's length."""
        for buffer in _footer(info):
            self._file.write(memoryview(buffer))
        size = self._file.finish()
        os.replace(self._path, self._folder / info.name)
        sync_folder(self._folder)
        return size

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class _DirectFile:
    """Writes around the page cache where that is possible: pages are read around it too, and memory is scarce."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            self._descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
            self._is_direct = hasattr(os, "O_DIRECT")
        except OSError:  # tmpfs, some network file systems
            path.unlink(missing_ok=True)
            self._descriptor = os.open(path, flags, 0o600)
            self._is_direct = False
        self._is_open = True
        self._block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))  # page-aligned, as direct writes want it
        self._used = 0

    def write(self, buffer: memoryview) -> None:
        """Append *buffer*."""
        while len(buffer):
            count = min(len(buffer), _BLOCK_BYTES - self._used)
            self._block[self._used : self._used + count] = buffer[:count]
            self._used += count
            buffer = buffer[count:]
            if self._used == _BLOCK_BYTES:
                self._flush()

    def finish(self) -> int:
        """Write what is left, sync, close; the file's length."""
        if self._is_direct:
            self._make_buffered()  # the end is no whole page
        self._flush()
        size = os.fstat(self._descriptor).st_size
        os.fsync(self._descriptor)
        self.close()
        return size

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)

    def _flush(self) -> None:
        rest = self._block[: self._used]
        while len(rest):
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._make_buffered()  # a file system that takes the flag and refuses the write
        self._used = 0

    def _make_buffered(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._is_direct = False


def read_info(path: Path) -> SegmentInfo:
    """The footer of the segment at *path*.

    Raises:
        DamagedSegment: it is not a whole segment of this version. OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return read_footer(file, str(path))


def read_footer(file: IO[bytes], name: str) -> SegmentInfo:
    """What the segment *file*, called *name*, says of itself; raises as :func:`read_info`."""
    size = file.seek(0, os.SEEK_END)
    if size < _TRAILER.size:
        raise DamagedSegment(f"{name}: {size} bytes are no segment")
    file.seek(size - _TRAILER.size)
    magic, version, checksum, length = _TRAILER.unpack(file.read(_TRAILER.size))
    if magic != _MAGIC or version != VERSION:
        raise DamagedSegment(f"{name}: not a segment of version {VERSION}")
    if length > min(_MAX_FOOTER, size - _TRAILER.size):
        raise DamagedSegment(f"{name}: a footer of {length} bytes in a file of {size}")
    file.seek(size - _TRAILER.size - length)
    text = file.read(length)
    if zlib.crc32(text) != checksum:
        raise DamagedSegment(f"{name}: its footer is damaged")
    try:
        info = _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise DamagedSegment(f"{name}: its footer cannot be understood: {error}") from error
    if info.layer_offsets[-1] + length + _TRAILER.size != size:
        raise DamagedSegment(f"{name}: {size} bytes, its footer speaks of others")
    return info


def verify(path: Path, info: SegmentInfo) -> list[int]:
    """The pages of the segment at *path* that are damaged, by reading all of it."""
    with open(path, "rb") as file:
        return damaged_pages(file, info)


def damaged_pages(file: IO[bytes], info: SegmentInfo) -> list[int]:
    """The pages of the segment *file* that are damaged, by reading all of it."""
    damaged = set()
    for layer, checksums in enumerate(info.checksums):
        size = info.encoded_bytes[layer]
        for page, checksum in enumerate(checksums):
            file.seek(info.layer_offsets[layer] + page * padded(size))
            if zlib.crc32(file.read(size)) != checksum:
                damaged.add(page)
    return sorted(damaged)


def sync_folder(folder: Path) -> None:
    """Make renames in *folder* survive a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):  # Windows has no handle for a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _footer(info: SegmentInfo) -> tuple[bytes, bytes]:
    fields = {
        "namespace": info.namespace,
        "keys": [key.hex() for key in info.keys],
        "parent": info.parent.hex(),
        "page_tokens": info.page_tokens,
        "codec": info.codec,
        "encoded_bytes": info.encoded_bytes,
        "shapes": [asdict(shape) for shape in dict.fromkeys(info.shapes)],
        "shape_of_layer": [list(dict.fromkeys(info.shapes)).index(shape) for shape in info.shapes],
        "checksums": info.checksums,
        "seconds": info.seconds,
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text, _TRAILER.pack(_MAGIC, VERSION, zlib.crc32(text), len(text))


def _parse(fields: dict) -> SegmentInfo:
    shapes = [PageShape(**shape) for shape in fields["shapes"]]
    info = SegmentInfo(
        namespace=str(fields["namespace"]),
        keys=tuple(bytes.fromhex(key) for key in fields["keys"]),
        parent=bytes.fromhex(fields["parent"]),
        page_tokens=int(fields["page_tokens"]),
        codec=str(fields["codec"]),
        encoded_bytes=tuple(map(int, fields["encoded_bytes"])),
        shapes=tuple(shapes[index] for index in fields["shape_of_layer"]),
        checksums=tuple(tuple(map(int, layer)) for layer in fields["checksums"]),
        seconds=float(fields["seconds"]),
    )
    if not 0 < len(info.keys) <= MAX_PAGES or min(info.encoded_bytes, default=0) <= 0 or info.page_tokens <= 0:
        raise ValueError("counts out of range")
    if len({len(info.shapes), len(info.checksums), len(info.encoded_bytes)}) != 1:
        raise ValueError("layers are counted differently")
    if any(len(layer) != len(info.keys) for layer in info.checksums):
        raise ValueError("pages are counted differently")
    if any(shape.dtype not in ITEM_BYTES for shape in shapes):
        raise ValueError("an unknown dtype")
    return info

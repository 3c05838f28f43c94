"""Converts a checkpoint to fewer bits, one shard at a time, in bounded memory.

Invariants: the source is only read; a shard is in place as a whole or not at all, and is read back and compared with
the source; ``config.json``, without which nothing loads a folder, comes last, and only if the source is then still
what it was before its headers were read; started again after a kill, shards that are in place are kept, if the source
is still the one that they were made from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from filelock import FileLock

from layerstream.checkpoint.codecs.encode import Encoder, make_encoder
from layerstream.checkpoint.folder import CONFIG, open_folder
from layerstream.checkpoint.header import TensorEntry, read_header, stored_bytes
from layerstream.checkpoint.names import PLANE_DTYPES, ParameterSource
from layerstream.checkpoint.packed import find_packed
from layerstream.checkpoint.reading import read_object
from layerstream.checkpoint.selection import ADAPTER_CONFIG
from layerstream.checkpoint.writer import ShardWriter, dtype_name
from layerstream.core.sizes import format_size
from layerstream.errors import (
    CheckpointError,
    ConfigurationError,
    InvalidHeader,
    LayerStreamError,
    ReadError,
    StorageFull,
    TruncatedFile,
)
from layerstream.hardware.files import write_whole
from layerstream.hardware.machine import cache_folder
from layerstream.model.module_sizes import is_plain_linear
from layerstream.model.skeleton import Skeleton, build_skeleton

logger = logging.getLogger(__name__)

JOB = "pack.json"
PART_BYTES = 8 * 2**20  # of a matrix, quantised at a time
COPY_BYTES = 16 * 2**20
SPARE_BYTES = 64 * 2**20
CHECKED_ROWS = 64
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt", "*.py", "LICENSE*", "README*")
OnShard = Callable[[int, int, int], None]
"""Told shards done, shards in all, and bytes written so far."""
_Identity: TypeAlias = list[list[Any]]
"""Names, sizes and times of a model's files."""


@dataclass(frozen=True, slots=True)
class PackReport:
    """What packing did: bytes before and after, shards that were written and that were there already."""

    source_bytes: int
    packed_bytes: int
    num_written: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class _Item:
    """A stored tensor, and whether it is to be quantised."""

    name: str
    entry: TensorEntry
    dtype: torch.dtype
    is_packed: bool


def pack(
    source: Path,
    target: Path,
    kind: str,
    *,
    keep_head: bool = False,
    trust_remote_code: bool = False,
    on_shard: OnShard = lambda done, count, num_bytes: None,
    identity: _Identity | None = None,
) -> PackReport:
    """Write *source* to *target* with its Linears in *kind*: ``"nf4"``, ``"int8"`` or ``"int4"``.

    Norms, biases, routers and the embedding stay as they are; the head too, with *keep_head*; and experts, but in int4
    where they are stored one by one (bitsandbytes has no format for them).

    Args:
        identity: the source's, where it was seen before; it must be that still.

    Raises:
        ConfigurationError: *target* is something else's or cannot be written, or the source is quantised already, or
            was changed meanwhile.
        StorageFull: there is not enough room, said before anything is written.
        InvalidHeader: what was written is not what it should be.
        ReadError, TruncatedFile: the source cannot be read.
    """
    identity = _identity(source) if identity is None else identity
    with _writing(target):
        skeleton = build_skeleton(source, trust_remote_code=trust_remote_code)
        if open_folder(source).packed:
            raise ConfigurationError(f"{source} is quantised already: pack the 16-bit original")
        encoder = make_encoder(kind)
        shards = _shards(skeleton, encoder, keep_head)
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        _prepare(source, target, {"kind": kind, "keep_head": keep_head, "source": identity})
        sizes = [_num_bytes(items, encoder) for items in shards]
        missing = [index for index, name in enumerate(names) if not (target / name).is_file()]
        needed, free = sum(sizes[index] for index in missing) + SPARE_BYTES, shutil.disk_usage(target).free
        if needed > free:
            raise StorageFull(f"{target}: {format_size(needed)} are needed and {format_size(free)} are free")
        done = sum(sizes) - sum(sizes[index] for index in missing)
        quantisation = encoder.config(_skipped(skeleton, shards))
        for number, index in enumerate(missing):
            on_shard(len(shards) - len(missing) + number, len(shards), done)
            _write(target / names[index], shards[index], encoder)
            _compare(target / names[index], shards[index], quantisation, encoder.format.most_error)
            _check_unchanged(source, identity, target / names[index])
            done += sizes[index]
        on_shard(len(shards), len(shards), done)
        _finish(source, target, names, quantisation, identity)
        return PackReport(skeleton.model_bytes, sum(sizes), len(missing), len(shards) - len(missing))


def ensure_packed(
    source: Path, kind: str, *, trust_remote_code: bool = False, on_shard: OnShard = lambda done, count, num_bytes: None
) -> Path:
    """The folder with *source* in *kind*: in the cache, packed now if it is not there. Other processes wait.

    It is found by the names, sizes and times of the source's files; where it lies: ``LAYERSTREAM_PACKED``, else
    ``layerstream/packed`` in the user's cache folder.

    Raises:
        As :func:`pack`.
    """
    identity = _identity(source)
    digest = hashlib.sha256(json.dumps([str(source.resolve()), identity]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("LAYERSTREAM_PACKED") or cache_folder() / "packed").expanduser()
    target = root / f"{source.resolve().name}-{kind}-{digest}"
    if not (target / "config.json").is_file():
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
        with _writing(root), FileLock(root / f"{target.name}.lock"):
            if not (target / "config.json").is_file():
                logger.info("%s is converted to %s once, in %s", source, kind, target)
                pack(source, target, kind, trust_remote_code=trust_remote_code, on_shard=on_shard, identity=identity)
    return target


def _shards(skeleton: Skeleton, encoder: Encoder, keep_head: bool) -> list[list[_Item]]:
    """The stored tensors, layer by layer; what belongs to no layer comes first and last."""
    linears = {
        f"{path}.weight"
        for path, module in skeleton.model.named_modules()
        if is_plain_linear(module) and not (keep_head and path == skeleton.head.name)
    }
    if skeleton.is_tied:
        linears.discard(skeleton.head_key)
    groups: dict[str, list[_Item]] = {}
    seen: set[str] = set()
    for key, found in skeleton.sources.items():
        assert isinstance(found, ParameterSource)
        node = next((node.name for node in skeleton.body if key.startswith(f"{node.name}.")), key)
        for piece in found.pieces:
            entry = piece.entry
            can = len(entry.shape) == 2 and encoder.can(*entry.shape)
            is_linear = key in linears and found.is_single and entry.shape == found.shape
            is_whole = piece.num_bytes == entry.extent.num_bytes
            is_expert = encoder.format.packs_experts and len(found.shape) == 3 and is_whole
            if entry.name not in seen:
                is_packed = can and (is_linear or is_expert)
                groups.setdefault(node, []).append(_Item(entry.name, entry, found.dtype, is_packed))
                seen.add(entry.name)
    return list(groups.values())


def _skipped(skeleton: Skeleton, shards: Sequence[Sequence[_Item]]) -> list[str]:
    """Linears that were left as they are, as transformers names them."""
    packed = {item.name for items in shards for item in items if item.is_packed}
    linears = [path for path, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [
        path
        for path in linears
        if not any(piece.entry.name in packed for piece in skeleton.sources[f"{path}.weight"].pieces)
    ]


def _planes(item: _Item, encoder: Encoder) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What *item* becomes: dtype name and shape."""
    if not item.is_packed:
        return {item.name: (item.entry.dtype, item.entry.shape)}
    return {
        name: (dtype_name(dtype), shape)
        for name, dtype, shape in encoder.planes(item.name, item.entry.shape, item.dtype)
    }


def _num_bytes(items: Sequence[_Item], encoder: Encoder) -> int:
    return sum(stored_bytes(*plane) for item in items for plane in _planes(item, encoder).values())


def _write(path: Path, items: Sequence[_Item], encoder: Encoder) -> None:
    shapes = {name: plane for item in items for name, plane in _planes(item, encoder).items()}
    with ShardWriter(path, shapes) as shard:
        for item in items:
            if not item.is_packed:
                shard.write(item.name, _bytes(item.entry))
                continue
            parts_of = _rows(item, encoder.row_step)
            for name, parts in encoder.encode(item.name, item.entry.shape, item.dtype, parts_of):
                shard.write(name, parts)


def _bytes(entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a stored tensor, a piece at a time."""
    size = entry.extent.num_bytes
    return _read(entry, ((start, min(COPY_BYTES, size - start)) for start in range(0, size, COPY_BYTES)))


def _rows(item: _Item, step: int) -> Iterator[torch.Tensor]:
    """Rows of a stored matrix, a part at a time."""
    rows, columns = item.entry.shape
    row_bytes = columns * item.dtype.itemsize
    count = max(step, PART_BYTES // row_bytes // step * step)
    parts = ((start * row_bytes, min(count, rows - start) * row_bytes) for start in range(0, rows, count))
    for raw in _read(item.entry, parts):
        yield torch.frombuffer(bytearray(raw), dtype=item.dtype).view(-1, columns)


def _read(entry: TensorEntry, parts: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Of a stored tensor, *parts* of so many bytes from there on.

    Raises:
        ReadError, TruncatedFile: the disk fails, or the file is shorter than it was.
    """
    extent = entry.extent
    try:
        with extent.path.open("rb") as file:
            for start, num_bytes in parts:
                raw = os.pread(file.fileno(), num_bytes, extent.offset + start)
                if len(raw) < num_bytes:
                    raise TruncatedFile(f"{extent.path}: ends within {entry.name!r}; fetch it again")
                yield raw
            _forget(file.fileno())
    except OSError as error:
        if isinstance(error, LayerStreamError) or error.filename not in {None, str(extent.path)}:
            raise
        raise ReadError(f"{extent.path}: cannot be read ({error.strerror}); look at the disk") from error


def _forget(descriptor: int) -> None:
    """Let the page cache go of a file that was read once."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _compare(path: Path, items: Sequence[_Item], quantisation: dict[str, Any], most: float) -> None:
    """Read a shard back: its matrices are those of the source, to within rounding.

    Raises:
        InvalidHeader: one is not; the shard is removed.
    """
    try:
        plain, packed = find_packed(read_header(path), quantisation)
        for item in items:
            if not item.is_packed:
                if plain[item.name].extent.num_bytes != item.entry.extent.num_bytes:
                    raise InvalidHeader(f"{path}: {item.name!r} has not the bytes of the source")
                continue
            error = _error(packed[item.name], item)
            if not error <= most:
                raise InvalidHeader(
                    f"{path}: {item.name!r} differs from the source by {error:.2f} of its size; the disk or the source "
                    "may be damaged: start again"
                )
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _error(matrix: Any, item: _Item) -> float:
    """Root mean square of the difference in the first rows, relative to the source's."""
    rows, columns = matrix.shape
    step = matrix.codec.row_step or rows
    count = min(rows, -(-CHECKED_ROWS // step) * step)
    planes = {}
    for name, entry in matrix.planes.items():
        whole = name in matrix.codec.whole
        size = entry.extent.num_bytes if whole else entry.extent.num_bytes * count // rows
        with entry.extent.path.open("rb") as file:
            raw = bytearray(os.pread(file.fileno(), size, entry.extent.offset))
        planes[name] = torch.frombuffer(raw, dtype=PLANE_DTYPES[entry.dtype])
        if not whole and len(entry.shape) > 1:
            planes[name] = planes[name].view(-1, *entry.shape[1:])
    found = torch.empty(count, columns)
    matrix.codec.decode(planes, 0, found)
    wanted = next(_rows(item, count))[:count].to(torch.float32)
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-12))


def _identity(source: Path) -> _Identity:
    """Which files the source has, and of when.

    Raises:
        ConfigurationError: it is a GGUF file.
        CheckpointError: it cannot be looked at.
    """
    if source.suffix == ".gguf":
        raise ConfigurationError(f"{source} is a GGUF file, which runs as it is: pack the safetensors original")
    try:
        files = sorted(path for path in source.iterdir() if path.suffix in {".safetensors", ".json"})
        found = [(path.name, path.stat()) for path in files]
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error}); fetch the model again") from error
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def _check_unchanged(source: Path, identity: _Identity, made: Path) -> None:
    """The source is what it was when *made* was begun, which is removed if it is not."""
    if _identity(source) != identity:
        made.unlink(missing_ok=True)
        raise ConfigurationError(
            f"{source} was changed while it was packed, so {made.parent} would be a mixture: delete that folder, and "
            "pack again when nothing writes to the source"
        )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """A folder that cannot be written is the caller's to change."""
    try:
        yield
    except LayerStreamError:
        raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(f"{target}: the disk is full; free some room and start again") from error
        raise ConfigurationError(f"{target}: cannot be written ({error}); pack into another folder") from error


def _prepare(source: Path, target: Path, job: dict[str, Any]) -> None:
    """Make *target*, or see that it is this job's."""
    if target.resolve() == source.resolve():
        raise ConfigurationError(f"{target} is the source itself: pack into another folder")
    target.mkdir(parents=True, exist_ok=True)
    note = target / JOB
    if note.is_file():
        if read_object(note) != job:
            raise ConfigurationError(
                f"{target} has a packing of another source, or of another kind, that was not finished: delete the "
                "folder, or pack into another one"
            )
        return
    if any(target.iterdir()):
        raise ConfigurationError(f"{target} is not empty: pack into another folder, or empty it")
    write_whole(note, json.dumps(job))


def _finish(
    source: Path, target: Path, names: Sequence[str], quantisation: dict[str, Any], identity: _Identity
) -> None:
    """Index, side files, and last the config. An adapter is of the source, and stays there."""
    weight_map = {tensor: name for name in names for tensor in read_header(target / name)}
    total = sum((target / name).stat().st_size for name in names)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for pattern in _SIDE_FILES:
        for path in source.glob(pattern):
            is_own = path.name in {CONFIG, ADAPTER_CONFIG} or path.name.endswith(".safetensors.index.json")
            if path.is_file() and not is_own and not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
    config = read_object(source / CONFIG) | {"quantization_config": quantisation}
    _check_unchanged(source, identity, target / CONFIG)
    write_whole(target / CONFIG, json.dumps(config, indent=2))
    (target / JOB).unlink()

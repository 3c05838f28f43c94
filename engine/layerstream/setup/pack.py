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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock

from layerstream.checkpoint.codecs.encode import make_encoder
from layerstream.checkpoint.folder import CONFIG, open_folder
from layerstream.checkpoint.gguf import open_gguf
from layerstream.checkpoint.header import read_header, stored_bytes
from layerstream.checkpoint.packed import find_packed
from layerstream.checkpoint.reading import read_object
from layerstream.checkpoint.selection import ADAPTER_CONFIG
from layerstream.checkpoint.writer import ShardWriter
from layerstream.core.sizes import format_size
from layerstream.errors import (
    CheckpointError,
    ConfigurationError,
    InvalidHeader,
    LayerStreamError,
    StorageFull,
)
from layerstream.hardware.files import write_whole
from layerstream.hardware.machine import cache_folder
from layerstream.model.skeleton import Skeleton, build_skeleton
from layerstream.setup.pack_gguf import QUANTISATION, gguf_shards, write_side_files
from layerstream.setup.pack_items import Item, folder_shards, skipped_linears

logger = logging.getLogger(__name__)

JOB = "pack.json"
SPARE_BYTES = 64 * 2**20
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

    Of a GGUF file no value changes: in int4 what it has in Q4_0 and Q4_1 goes into tiles, and the rest stays as it is.

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
        shards, quantisation = _plan(source, skeleton, kind, keep_head)
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        _prepare(source, target, {"kind": kind, "keep_head": keep_head, "source": identity})
        sizes = [_num_bytes(items) for items in shards]
        missing = [index for index, name in enumerate(names) if not (target / name).is_file()]
        needed, free = sum(sizes[index] for index in missing) + SPARE_BYTES, shutil.disk_usage(target).free
        if needed > free:
            raise StorageFull(f"{target}: {format_size(needed)} are needed and {format_size(free)} are free")
        done = sum(sizes) - sum(sizes[index] for index in missing)
        for number, index in enumerate(missing):
            on_shard(len(shards) - len(missing) + number, len(shards), done)
            _write(target / names[index], shards[index])
            _compare(target / names[index], shards[index], quantisation)
            _check_unchanged(source, identity, target / names[index])
            done += sizes[index]
        on_shard(len(shards), len(shards), done)
        config = write_side_files(source, target, skeleton) if _is_gguf(source) else _copy_side_files(source, target)
        _write_index(target, names)
        _check_unchanged(source, identity, target / CONFIG)
        write_whole(target / CONFIG, json.dumps(config | {"quantization_config": quantisation}, indent=2))
        (target / JOB).unlink()
        return PackReport(skeleton.model_bytes, sum(sizes), len(missing), len(shards) - len(missing))


def _plan(source: Path, skeleton: Skeleton, kind: str, keep_head: bool) -> tuple[list[list[Item]], dict[str, Any]]:
    """What is written, shard by shard, and the ``quantization_config`` that says so.

    Raises:
        ConfigurationError: the source is quantised, and is no GGUF file that may go into tiles.
    """
    if _is_gguf(source):
        if kind != "int4":
            raise ConfigurationError(
                f"{source} is a GGUF file, whose values stay as they are: pack it to int4, or the safetensors original "
                f"to {kind}"
            )
        return gguf_shards(skeleton), QUANTISATION
    if open_folder(source).packed:
        raise ConfigurationError(f"{source} is quantised already: pack the 16-bit original")
    encoder = make_encoder(kind)
    shards = folder_shards(skeleton, encoder, keep_head)
    return shards, encoder.config(skipped_linears(skeleton, shards))


def _is_gguf(source: Path) -> bool:
    return source.suffix == ".gguf"


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


def _num_bytes(items: Sequence[Item]) -> int:
    return sum(stored_bytes(*plane) for item in items for plane in item.planes.values())


def _write(path: Path, items: Sequence[Item]) -> None:
    shapes = {name: plane for item in items for name, plane in item.planes.items()}
    with ShardWriter(path, shapes) as shard:
        for item in items:
            for name, parts in item.parts():
                shard.write(name, parts)


def _compare(path: Path, items: Sequence[Item], quantisation: dict[str, Any]) -> None:
    """Read a shard back.

    Raises:
        InvalidHeader: one of *items* is not what it should be; the shard is removed.
    """
    try:
        plain, packed = find_packed(read_header(path), quantisation)
        for item in items:
            if (problem := item.problem(plain, packed)) is not None:
                raise InvalidHeader(
                    f"{path}: {item.name!r} {problem}; the disk or the source may be damaged: start again"
                )
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _identity(source: Path) -> _Identity:
    """Which files the source has, and of when.

    Raises:
        CheckpointError: it cannot be looked at.
    """
    file = open_gguf(source) if _is_gguf(source) else None
    try:
        if file is not None:
            files = sorted({tensor.entry.extent.path for tensor in file.tensors.values()})
        else:
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


def _copy_side_files(source: Path, target: Path) -> dict[str, Any]:
    """Put what lies beside the weights of *source* into *target*, but for an adapter, which is of the source alone; the
    config that goes there."""
    for pattern in _SIDE_FILES:
        for path in source.glob(pattern):
            is_own = path.name in {CONFIG, ADAPTER_CONFIG} or path.name.endswith(".safetensors.index.json")
            if path.is_file() and not is_own and not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
    return read_object(source / CONFIG)


def _write_index(target: Path, names: Sequence[str]) -> None:
    weight_map = {tensor: name for name in names for tensor in read_header(target / name)}
    total = sum((target / name).stat().st_size for name in names)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

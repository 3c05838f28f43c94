"""What people do with a store: look, verify, make room, carry a corpus to another machine. No model, no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from layerstream.errors import KVStoreUnusable, StorageFull
from layerstream.hardware.files import temporary_path
from layerstream.store import fingerprint
from layerstream.store.answers import Answers
from layerstream.store.archive import Archive, Kept, Packed, open_archive, parents_first, write_archive
from layerstream.store.index import SegmentRow
from layerstream.store.retrievals import StoredRetrievals
from layerstream.store.segment import DamagedSegment, read_info, sync_folder, verify
from layerstream.store.tiers.folder import ABOUT, Bounds, StoreFolder
from layerstream.store.tiers.locks import open_locked


@dataclass(frozen=True, slots=True)
class NamespaceSummary:
    """What is stored for one model under one arithmetic and tenant.

    Attributes:
        snapshots: states of recurrent layers after a page; ``snapshot_bytes`` of ``num_bytes`` are theirs.
        hits: times that a segment was used after it was written.
        last_used: seconds since the epoch.
        answers: what was answered after its prefixes, and is remembered.
    """

    name: str
    model: str
    about: dict[str, Any]
    segments: int
    pages: int
    tokens: int
    num_bytes: int
    snapshots: int
    snapshot_bytes: int
    pinned_bytes: int
    hits: int
    last_used: float
    answers: int


def summarise(folder: StoreFolder) -> list[NamespaceSummary]:
    """Every namespace, the largest first."""
    found = []
    rows = folder.index.segments()
    for name, description in folder.index.namespaces().items():
        about = json.loads(description or "{}")
        own = [row for row in rows if row.namespace == name]
        pages = sum(row.num_pages for row in own if not row.is_snapshot)
        snapshots = [row for row in own if row.is_snapshot]
        page_tokens = about.get("fingerprint", {}).get("layout", {}).get("page_tokens", 0)
        found.append(
            NamespaceSummary(
                name=name,
                model=about.get("model", "?"),
                about=about,
                segments=len(own),
                pages=pages,
                tokens=pages * page_tokens,
                num_bytes=sum(row.num_bytes for row in own),
                snapshots=len(snapshots),
                snapshot_bytes=sum(row.num_bytes for row in snapshots),
                pinned_bytes=sum(row.num_bytes for row in own if row.pinned),
                hits=sum(row.frequency - 1 for row in own),
                last_used=max((row.last_used for row in own), default=0.0),
                answers=Answers(folder.index).count(name),
            )
        )
    return sorted(found, key=lambda summary: -summary.num_bytes)


def choose(folder: StoreFolder, wanted: str | None) -> list[NamespaceSummary]:
    """The namespaces whose name begins with *wanted* or whose model is it; all if it is ``None``.

    Raises:
        KVStoreUnusable: there is none.
    """
    summaries = summarise(folder)
    chosen = [s for s in summaries if wanted is None or s.model == wanted or s.name.startswith(wanted)]
    if wanted is not None and not chosen:
        known = ", ".join(sorted({summary.model for summary in summaries})) or "nothing"
        raise KVStoreUnusable(f"{folder.path} holds nothing for {wanted!r}; it holds {known}")
    return chosen


@dataclass(frozen=True, slots=True)
class Damage:
    """A segment, and how many of its pages (and what descends from them) were dropped; a snapshot is one."""

    path: Path
    pages: int
    reason: str


def verify_all(folder: StoreFolder) -> Iterator[tuple[Path, Damage | None]]:
    """Read every segment; drop what is damaged, with its descendants."""
    for row in folder.index.segments():
        path = folder.segment_path(row.namespace, row.name)
        damage = None
        try:
            info, known = read_info(path), set(folder.index.keys_of(row.segment))
            bad = [slot for slot in verify(path, info) if info.keys[slot] in known]  # the rest was dropped before
            if bad:
                what = "snapshots" if info.is_snapshot else "pages"
                damage = Damage(path, len(bad), f"{len(bad)} of {len(info.keys)} {what} differ from their checksum")
                _drop(folder, row.namespace, [info.keys[bad[0]]])
        except (DamagedSegment, OSError) as error:
            damage = Damage(path, row.num_pages, str(error))
            _drop(folder, row.namespace, folder.index.keys_of(row.segment))
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        yield path, damage


def prune(folder: StoreFolder, max_bytes: int) -> int:
    """Evict until at most *max_bytes* are stored; the bytes that became free. Pinned segments and those in use stay."""
    before = folder.total_bytes()
    folder.make_room(0, Bounds(max_bytes, 0))
    return before - folder.total_bytes()


def clear(folder: StoreFolder, namespace: NamespaceSummary) -> int:
    """Remove all of *namespace* that no process reads, pins and answers included; the bytes that became free.

    With the last one goes how often documents were retrieved.
    Files go before the index hears of it, so a full disk is no obstacle.
    """
    before = folder.total_bytes()
    remaining = remaining_segments(folder, namespace)
    while remaining:  # leaves first: whatever nothing depends on goes in each round
        left = [row for row in remaining if not folder.remove(row.segment)]
        if len(left) == len(remaining):
            break
        remaining = left
    if remaining:
        folder.index.unpin(namespace.name)
        Answers(folder.index).forget(namespace.name)
    else:
        folder.index.remove_namespace(namespace.name)
        if not folder.index.namespaces():  # counts belong to all of them
            StoredRetrievals(folder.index).forget()
        own = folder.path / namespace.name
        (own / ABOUT).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody is writing there
            own.rmdir()
    return before - folder.total_bytes()


def remaining_segments(folder: StoreFolder, namespace: NamespaceSummary) -> list[SegmentRow]:
    """What there is of *namespace*: after :func:`clear`, what other processes are reading."""
    return [row for row in folder.index.segments() if row.namespace == namespace.name]


def export(folder: StoreFolder, namespace: NamespaceSummary, out: Path) -> int:
    """Write *namespace*, with its pins and answers, to the tar file *out*; the number of segments.

    Raises:
        FileExistsError: *out* is there already. StorageFull: there is no room for it. Nothing is left of it then.
    """
    rows = remaining_segments(folder, namespace)
    pinned = frozenset(row.name for row in rows if row.pinned)
    kept = Kept(pinned, tuple(Answers(folder.index).all(namespace.name)))
    about = json.dumps(namespace.about, indent=1, sort_keys=True).encode()
    with _full_disk(out):
        return write_archive(out, about, kept, _opened(folder.segment_path(row.namespace, row.name) for row in rows))


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of an archive's segments: *new* ones, *known* before, *damaged*, and without *room* or beginning."""

    new: int
    known: int
    damaged: int
    without_room: int


def import_(folder: StoreFolder, source: Path, namespace: str, about: dict[str, Any], bounds: Bounds) -> Imported:
    """Take over the archive *source* for the engine whose namespace and description these are, within *bounds*.

    Every segment is verified before anything makes room for it.

    Raises:
        KVStoreUnusable: not an export, or one of another model, arithmetic or tenant: says in what they differ.
        StorageFull: the disk is full; what was taken over until then stays.
    """
    with open_archive(source) as archive:
        theirs = archive.about.get("fingerprint")
        differing = fingerprint.differences(about["fingerprint"], theirs if isinstance(theirs, dict) else {})
        if differing:
            raise KVStoreUnusable(
                f"{source} holds KV of {archive.about.get('model')!r} that this engine must not use; they differ in "
                + "; ".join(differing[:5])
            )
        packed, damaged = archive.segments()
        if any(item.info.namespace != namespace for item in packed):
            raise KVStoreUnusable(f"{source} was written for another tenant (salt)")
        with _full_disk(folder.path):
            folder.describe(namespace, about)
            number = folder.index.namespace_id(namespace, json.dumps(about, sort_keys=True))
            assert number is not None
            return _take_over(folder, archive, _Target(namespace, number, bounds), packed, damaged)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where an archive goes."""

    namespace: str
    number: int
    bounds: Bounds


def _take_over(folder: StoreFolder, archive: Archive, target: _Target, packed: list[Packed], damaged: int) -> Imported:
    index, mine, known, new = folder.index, [], 0, 0
    there = [item.info.parent for item in packed if index.find(target.number, [item.info.parent])]
    names, count = index.names(target.number), len(packed) + damaged
    for item in parents_first(packed, there):
        info = item.info
        if info.name in names:
            known += 1
            continue
        if not archive.is_sound(item):
            damaged += 1
            continue
        if not folder.make_room(item.num_bytes, target.bounds, mine):
            continue
        segment = index.reserve(target.number, info.name, item.num_bytes)
        if segment is not None and _copy(folder, archive, target, item, segment):
            mine.append(segment)
            new += 1
    answers = Answers(index)
    for answer in archive.kept.answers:
        answers.remember(target.number, target.namespace, answer)
    return Imported(new, known, damaged, count - new - known - damaged)


def _copy(folder: StoreFolder, archive: Archive, target: _Target, item: Packed, segment: int) -> bool:
    """Have *item* lie in its place, and in the index; whether it could be entered."""
    path = folder.segment_path(target.namespace, item.info.name)
    temporary, is_entered = temporary_path(path), False
    try:
        archive.copy(item, temporary)
        temporary.replace(path)
        sync_folder(path.parent)
        pinned = item.info.name in archive.kept.pinned
        is_entered = folder.index.add_segment(target.number, item.info, item.num_bytes, pinned=pinned)
    finally:
        if not is_entered:
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            folder.index.cancel(segment)
    return is_entered


def _opened(paths: Iterable[Path]) -> Iterator[tuple[str, IO[bytes]]]:
    """The segments at *paths* that are still there, kept from eviction while they are read."""
    for path in paths:
        try:
            descriptor = open_locked(path)
        except OSError:
            continue
        with open(descriptor, "rb") as file:
            yield path.name, file


@contextlib.contextmanager
def _full_disk(where: Path) -> Iterator[None]:
    """Says so where it is full."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise StorageFull(f"{where}: the disk is full; free some of it and try again") from error
        raise


def _drop(folder: StoreFolder, namespace: str, keys: Iterable[bytes]) -> None:
    number = folder.index.namespace_id(namespace)
    if number is not None and not folder.read_only:
        folder.forget(namespace, number, *keys)

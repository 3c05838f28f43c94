"""What people do with a store: look, verify, make room, carry a corpus to another machine. No model, no torch."""

from __future__ import annotations

import contextlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.errors import KVStoreUnusable
from layerstream.files import TEMPORARY
from layerstream.kv import fingerprint
from layerstream.kv.answers import Answers
from layerstream.kv.segment import SUFFIX, DamagedSegment, read_info, sync_folder, verify
from layerstream.kv.tiers.folder import ABOUT, Bounds, StoreFolder


@dataclass(frozen=True, slots=True)
class NamespaceSummary:
    """What is stored for one model under one arithmetic and tenant.

    Attributes:
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
        pages = sum(row.num_pages for row in own)
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
    """A segment, and how many of its pages (and what descends from them) were dropped."""

    path: Path
    pages: int
    reason: str


def verify_all(folder: StoreFolder) -> Iterator[tuple[Path, Damage | None]]:
    """Read every segment; drop what is damaged, with its descendants."""
    for row in folder.index.segments():
        path = folder.segment_path(row.namespace, row.name)
        damage = None
        try:
            info = read_info(path)
            bad = verify(path, info)
            if bad:
                damage = Damage(path, len(bad), f"{len(bad)} of {len(info.keys)} pages differ from their checksum")
                _drop(folder, row.namespace, info.keys[bad[0]])
        except (DamagedSegment, OSError) as error:
            damage = Damage(path, row.num_pages, str(error))
            _drop_segment(folder, row.namespace, row.segment)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        yield path, damage


def prune(folder: StoreFolder, max_bytes: int) -> int:
    """Evict until at most *max_bytes* are stored; the bytes that became free. Pinned segments and those in use stay."""
    before = folder.total_bytes()
    folder.make_room(0, Bounds(max_bytes, 0))
    return before - folder.total_bytes()


def clear(folder: StoreFolder, namespace: NamespaceSummary) -> int:
    """Remove all of *namespace* that no process reads, pins included; the bytes that became free."""
    before = folder.total_bytes()
    folder.index.unpin(namespace.name)
    remaining = [row for row in folder.index.segments() if row.namespace == namespace.name]
    while remaining:  # leaves first: whatever nothing depends on goes in each round
        left = [row for row in remaining if not folder.remove(row.segment)]
        if len(left) == len(remaining):
            break
        remaining = left
    if not remaining:
        folder.index.remove_namespace(namespace.name)
        own = folder.path / namespace.name
        (own / ABOUT).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody is writing there
            own.rmdir()
    return before - folder.total_bytes()


def export(folder: StoreFolder, namespace: NamespaceSummary, out: Path) -> int:
    """Write *namespace* to the tar file *out*; the number of segments.

    Raises:
        FileExistsError: *out* is there already.
    """
    count = 0
    with tarfile.open(out, "x") as archive:
        own = folder.path / namespace.name
        archive.add(own / ABOUT, ABOUT)
        for row in folder.index.segments():
            path = own / row.name
            if row.namespace == namespace.name and path.exists():
                archive.add(path, row.name)
                count += 1
    return count


def import_(folder: StoreFolder, source: Path, namespace: str, about: dict[str, Any], bounds: Bounds) -> int:
    """Take over the segments of the archive *source* for the engine whose namespace and description these are.

    Every segment is verified; damaged ones are left out. Returns the number of segments that are new.

    Raises:
        KVStoreUnusable: not an export, or one of another model, arithmetic or tenant: says in what they differ.
    """
    try:
        archive = tarfile.open(source)  # noqa: SIM115  # closed below
    except tarfile.TarError as error:
        raise KVStoreUnusable(f"{source} is not an export of a KV store: {error}") from error
    with archive:
        member = next((member for member in archive if member.name == ABOUT and member.isfile()), None)
        handle = None if member is None else archive.extractfile(member)
        if handle is None:
            raise KVStoreUnusable(f"{source} is not an export of a KV store: it has no {ABOUT}")
        theirs = json.loads(handle.read())
        differing = fingerprint.differences(about["fingerprint"], theirs.get("fingerprint", {}))
        if differing:
            raise KVStoreUnusable(
                f"{source} holds KV of {theirs.get('model')!r} that this engine must not use; they differ in "
                + "; ".join(differing[:5])
            )
        folder.describe(namespace, about)
        number = folder.index.namespace_id(namespace, json.dumps(about, sort_keys=True))
        assert number is not None
        return _take_over(folder, archive, namespace, number, bounds)


def _take_over(folder: StoreFolder, archive: tarfile.TarFile, namespace: str, number: int, bounds: Bounds) -> int:
    own = folder.path / namespace
    found = []
    for member in archive:
        name = Path(member.name).name
        if not member.isfile() or not name.endswith(SUFFIX) or (own / name).exists():
            continue
        data = archive.extractfile(member)
        if data is None or not folder.make_room(member.size, bounds):
            continue
        with tempfile.NamedTemporaryFile(dir=own, suffix=TEMPORARY, delete=False) as temporary:
            while block := data.read(2**20):
                temporary.write(block)
        path = Path(temporary.name)
        try:
            info = read_info(path)
            if info.namespace != namespace:
                raise KVStoreUnusable(f"{archive.name} was written for another tenant (salt)")
            if verify(path, info) or info.name != name:
                continue
            path.replace(own / name)
            found.append((info, member.size))
        except DamagedSegment:
            continue
        finally:
            path.unlink(missing_ok=True)
    sync_folder(own)
    refused = folder.index.add_segments(number, found)
    for info, _ in refused:
        (own / info.name).unlink(missing_ok=True)
    return len(found) - len(refused)


def _drop(folder: StoreFolder, namespace: str, key: bytes) -> None:
    number = folder.index.namespace_id(namespace)
    if number is not None:
        folder.forget(namespace, number, key)


def _drop_segment(folder: StoreFolder, namespace: str, segment: int) -> None:
    for key in folder.index.keys_of(segment):
        _drop(folder, namespace, key)

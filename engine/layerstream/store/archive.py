"""The file in which a namespace travels to another machine: a plain tar, its owner's alone.

::

    about.json     what the namespace stands for
    kept.json      what only the index has: which segments are pinned, and the answers that are remembered
    *.kv           segments

An archive is hostile input: nothing is taken over before its description, every footer and every checksum was looked
at in place, and what is read at once has a limit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from layerstream.errors import KVStoreUnusable
from layerstream.store.answers import RememberedAnswer
from layerstream.store.segment import SUFFIX, DamagedSegment, Key, SegmentInfo, damaged_pages, read_footer

ABOUT = "about.json"
KEPT = "kept.json"
MOST_ABOUT_BYTES = 2**22
MOST_KEPT_BYTES = 2**27
_COPIED_AT_ONCE = 2**20
_MOST_TOKEN = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Kept:
    """What a namespace has beside its segments: the names of those that are pinned, and answers, the oldest first."""

    pinned: frozenset[str] = frozenset()
    answers: tuple[RememberedAnswer, ...] = ()


@dataclass(frozen=True, slots=True)
class Packed:
    """A segment in an archive."""

    info: SegmentInfo
    member: tarfile.TarInfo

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self.member.size


def write_archive(out: Path, about: bytes, kept: Kept, segments: Iterable[tuple[str, IO[bytes]]]) -> int:
    """Write the new file *out*; how many segments it has. On failure nothing is left of it.

    Raises:
        FileExistsError: *out* is there already. OSError: the disk is full.
    """
    count = 0
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with open(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
            _add(archive, ABOUT, io.BytesIO(about), len(about))
            text = _kept_text(kept)
            _add(archive, KEPT, io.BytesIO(text), len(text))
            for name, data in segments:
                _add(archive, name, data, os.fstat(data.fileno()).st_size)
                count += 1
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return count


class Archive:
    """What :func:`write_archive` wrote.

    Attributes:
        about: the description.
        kept: pins and answers; an archive of an older version has none.
    """

    def __init__(self, source: Path, archive: tarfile.TarFile) -> None:
        self._source = source
        self._archive = archive
        self._members = {
            Path(member.name).name: member for member in archive if member.isreg() and not member.issparse()
        }
        if ABOUT not in self._members:
            raise KVStoreUnusable(f"{source} is not an export of a KV store: it has no {ABOUT}")
        self.about: dict[str, Any] = self._read(ABOUT, MOST_ABOUT_BYTES)
        self.kept = _parse_kept(self._read(KEPT, MOST_KEPT_BYTES)) if KEPT in self._members else Kept()

    def segments(self) -> tuple[list[Packed], int]:
        """The segments that are whole, by their footers, and how many are not."""
        found, damaged = [], 0
        for name, member in self._members.items():
            if not name.endswith(SUFFIX):
                continue
            try:
                info = read_footer(self._open(member), name)
            except DamagedSegment:
                damaged += 1
                continue
            if info.name == name:
                found.append(Packed(info, member))
            else:
                damaged += 1
        return found, damaged

    def is_sound(self, packed: Packed) -> bool:
        """Whether every page has its checksum, by reading all of it."""
        return not damaged_pages(self._open(packed.member), packed.info)

    def copy(self, packed: Packed, path: Path) -> None:
        """Write *packed* to the new file *path*, synced; on failure nothing is left of it."""
        data = self._open(packed.member)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            with open(descriptor, "wb") as file:
                while some := data.read(_COPIED_AT_ONCE):
                    file.write(some)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _open(self, member: tarfile.TarInfo) -> IO[bytes]:
        data = self._archive.extractfile(member)
        assert data is not None, "a regular file"
        return data

    def _read(self, name: str, most_bytes: int) -> dict[str, Any]:
        member = self._members[name]
        if member.size > most_bytes:
            raise KVStoreUnusable(f"{self._source}: its {name} has {member.size} bytes, more than {most_bytes}")
        found = json.loads(self._open(member).read())
        if not isinstance(found, dict):
            raise KVStoreUnusable(f"{self._source} is not an export of a KV store: its {name} is no object")
        return found


@contextlib.contextmanager
def open_archive(source: Path) -> Iterator[Archive]:
    """The archive *source*.

    Raises:
        KVStoreUnusable: it is none, or its contents, read inside, make no sense.
    """
    try:
        with tarfile.open(source, "r:") as archive:
            yield Archive(source, archive)
    except (tarfile.TarError, ValueError, KeyError, TypeError, EOFError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise KVStoreUnusable(f"{source} is not an export of a KV store: {reason:.200}") from error


def parents_first(packed: Sequence[Packed], known: Iterable[Key]) -> list[Packed]:
    """Those of *packed* whose beginning is among *known* pages or another's, each behind what it continues."""
    continuing: dict[Key, list[Packed]] = {}
    for item in packed:
        continuing.setdefault(item.info.parent, []).append(item)
    there, ordered = [b"", *known], []
    while there:
        for item in continuing.pop(there.pop(), ()):
            ordered.append(item)
            there += item.info.keys
    return ordered


def _add(archive: tarfile.TarFile, name: str, data: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    archive.addfile(member, data)


def _kept_text(kept: Kept) -> bytes:
    answers = [{"prefix": item.prefix.hex(), "question": item.question, "answer": item.answer} for item in kept.answers]
    return json.dumps({"pinned": sorted(kept.pinned), "answers": answers}, separators=(",", ":")).encode()


def _parse_kept(found: dict[str, Any]) -> Kept:
    answers = [
        RememberedAnswer(bytes.fromhex(item["prefix"]), _tokens(item["question"]), _tokens(item["answer"]))
        for item in found["answers"]
    ]
    return Kept(frozenset(map(str, found["pinned"])), tuple(answers))


def _tokens(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(token) is int and 0 <= token <= _MOST_TOKEN for token in found):
        raise ValueError("an answer that is no list of token ids")
    return tuple(found)

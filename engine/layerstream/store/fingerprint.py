"""What KV depends on, as one hash: whoever has the same fingerprint may use the same pages, nobody else.

The fingerprint is the SHA-256 of canonical JSON. Its fields, and the stale or foreign KV that each one keeps out:

| field | keeps out |
|---|---|
| weights: SHA-256 of every file of parameters | weights swapped under the same name (vLLM #49261, SGLang #26792) |
| config: the whole text config | another RoPE scaling (vLLM #56311) |
| context: tokens a sequence may have | a regime of LongRoPE or dynamic NTK (vLLM #56331) |
| dtypes of compute and of KV, resolved | fp16 read as bf16: the same number of bytes (vLLM #49438) |
| page_tokens, codec, layout, attention | pages of another shape or meaning |
| layers: what each caches, attends to and sees | KV of a window that was overlooked, or that another layer keeps |
| cuts: the rows of every Linear that is cut | products computed with other kernels' shapes |
| threads, vectors, processor, torch, transformers, device | arithmetic that rounds otherwise |

The last row is left out where answers need not be bit for bit the same (``exact=False``).

Digests of weights: a hub's blob is named by its SHA-256 already; other files are hashed once and the digest is
remembered under path, inode, size, mtime and ctime. Until it is known nothing is published or taken, and a file that
changes while it is in use is never published for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

LAYOUT = 3  # 2: activations in whole vectors, whose last bits were others before; 3: what layers see is traced
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 8 * 2**20
_NOT_IDENTITY = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


class DigestMemory(Protocol):
    """Remembers digests of files."""

    def digest(self, path: Path, stat: os.stat_result) -> str | None:
        """The digest of *path*, if it is known for exactly this file."""
        ...

    def remember_digest(self, path: Path, stat: os.stat_result, sha256: str) -> None:
        """Remember it."""
        ...


@dataclass(frozen=True)
class WeightFiles:
    """The files that a model's weights come from, as they were when the model was opened."""

    files: Mapping[Path, os.stat_result]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> WeightFiles:
        """Look at *paths*."""
        return cls({path: path.stat() for path in sorted(set(paths))})

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(stat.st_size for stat in self.files.values())

    def is_unchanged(self) -> bool:
        """Whether all files are still the ones that were opened."""
        try:
            return all(_same(path.stat(), stat) for path, stat in self.files.items())
        except OSError:
            return False

    def known_digests(self, memory: DigestMemory) -> list[str] | None:
        """Digests of all files without reading them, or ``None``."""
        found = [_blob_name(path) or memory.digest(path, stat) for path, stat in self.files.items()]
        return [digest for digest in found if digest] if all(found) else None

    def take_digests(
        self, memory: DigestMemory | None, is_stopped: Callable[[], bool] = lambda: False
    ) -> list[str] | None:
        """Read and hash what is not known; ``None`` if it was stopped or a file is not the one that was opened."""
        digests = []
        for path, stat in self.files.items():
            known = _blob_name(path) or (memory.digest(path, stat) if memory else None)
            digest = known or _hash(path, is_stopped)
            if digest is None or not _same(path.stat(), stat):
                return None
            if not known and memory:
                memory.remember_digest(path, stat, digest)
            digests.append(digest)
        return digests


def describe(
    *,
    weights: Iterable[str],
    config: Mapping[str, Any],
    layout: Mapping[str, Any],
    arithmetic: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that KV depends on, as JSON values.

    Args:
        weights: digests of the weight files.
        config: the text config.
        layout: dtypes, page size, codec, cuts, context.
        arithmetic: what makes results differ in their last bits; ``None`` to do without.
    """
    fields = {
        "layout_version": LAYOUT,
        "weights": sorted(weights),
        "config": {name: value for name, value in config.items() if name not in _NOT_IDENTITY},
        "layout": dict(layout),
        "arithmetic": None if arithmetic is None else dict(arithmetic),
    }
    return json.loads(json.dumps(fields, default=str))  # as whoever reads it from a file will see it


def namespace(fingerprint: Mapping[str, Any], salt: str) -> str:
    """The name under which pages of *fingerprint* are kept for the tenant with *salt*."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return hashlib.sha256(digest + salt.encode()).hexdigest()[:40]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two fingerprints differ, as ``layout.page_tokens: 128, there 64``."""
    found = []
    for name in sorted({*ours, *theirs}):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += differences(mine, other, f"{prefix}{name}.")
        elif json.dumps(mine, default=str) != json.dumps(other, default=str):
            found.append(f"{prefix}{name}: {_short(mine)}, there {_short(other)}")
    return found


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _same(stat: os.stat_result, other: os.stat_result) -> bool:
    names = ("st_ino", "st_dev", "st_size", "st_mtime_ns", "st_ctime_ns")
    return all(getattr(stat, name) == getattr(other, name) for name in names)


def _blob_name(path: Path) -> str | None:
    """The digest that a hub cache names the file by: a link to ``blobs/<sha256>``."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and _BLOB_NAME.fullmatch(target.name) else None


def _hash(path: Path, is_stopped: Callable[[], bool]) -> str | None:
    hasher = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        at = 0
        while got := file.readinto(buffer):
            if is_stopped():
                return None
            hasher.update(view[:got])
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), at, got, os.POSIX_FADV_DONTNEED)
            at += got
    return hasher.hexdigest()

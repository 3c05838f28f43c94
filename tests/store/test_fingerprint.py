"""What separates KV from KV that must not be taken for it."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from layerstream.store import fingerprint
from layerstream.store.fingerprint import WeightFiles

WHOLE: dict[str, Any] = {
    "weights": ["aa", "bb"],
    "config": {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "layout": {"dtype": "bfloat16", "kv_dtype": "bfloat16", "page_tokens": 128, "compression": "none", "context": 4096},
    "arithmetic": {"threads": 2, "vectors": "AVX512", "torch": "2.13", "cuts": "none"},
}


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, value in tree.items():
        found += leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]
    return found


def name_of(parts: dict[str, Any], salt: str = "") -> str:
    return fingerprint.namespace(fingerprint.describe(**parts), salt)


@pytest.mark.parametrize("path", leaves(WHOLE), ids=".".join)
def test_every_field_counts(path: tuple[str, ...]) -> None:
    changed = copy.deepcopy(WHOLE)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = ["other"] if path == ("weights",) else "other"
    assert name_of(changed) != name_of(WHOLE)
    found = fingerprint.differences(fingerprint.describe(**WHOLE), fingerprint.describe(**changed))
    assert len(found) == 1
    assert found[0].startswith(".".join(path))


def test_what_does_not_count() -> None:
    changed = copy.deepcopy(WHOLE)
    changed["weights"].reverse()
    changed["config"] |= {"_name_or_path": "elsewhere", "transformers_version": "9"}
    assert name_of(changed) == name_of(WHOLE)


def test_tenants_are_apart() -> None:
    assert name_of(WHOLE, "a") == name_of(WHOLE, "a")
    assert len({name_of(WHOLE, salt) for salt in ("", "a", "b")}) == 3


class Memory:
    """Remembers as the index does."""

    def __init__(self) -> None:
        self.known: dict[tuple, str] = {}

    def digest(self, path: Path, stat: os.stat_result) -> str | None:
        return self.known.get((path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))

    def remember_digest(self, path: Path, stat: os.stat_result, sha256: str) -> None:
        self.known[path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] = sha256


def test_digests_are_taken_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    memory, files = Memory(), WeightFiles.of([tmp_path / "a"])
    assert files.known_digests(memory) is None
    taken = files.take_digests(memory)
    assert taken == [hashlib.sha256(b"weights").hexdigest()]
    assert files.known_digests(memory) == taken


@pytest.mark.parametrize("keep_times", [False, True])
def test_another_file_under_the_same_name_and_size(keep_times: bool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    memory, files = Memory(), WeightFiles.of([path])
    first = files.take_digests(memory)
    times = path.stat()
    other = tmp_path / "b"
    other.write_bytes(b"WEIGHTS")
    shutil.move(other, path)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not files.is_unchanged()
    again = WeightFiles.of([path])
    assert again.known_digests(memory) is None
    assert again.take_digests(memory) != first


def test_overwriting_in_place_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    files = WeightFiles.of([path])
    path.write_bytes(b"WEIGHTS")
    assert not files.is_unchanged()
    assert files.take_digests(Memory()) is None
    path.unlink()
    assert not files.is_unchanged()


def test_a_hubs_blob_has_its_digest_in_its_name(tmp_path: Path) -> None:
    digest = "ab" * 32
    blob = tmp_path / "blobs" / digest
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    link = tmp_path / "snapshots" / "1" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert WeightFiles.of([link]).known_digests(Memory()) == [digest]


def test_taking_digests_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    assert WeightFiles.of([tmp_path / "a"]).take_digests(Memory(), lambda: True) is None

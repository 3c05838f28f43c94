"""A corpus travels whole or is refused with a reason; taking it over keeps to the bound and evicts for nothing bad."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layerstream.errors import KVStoreUnusable, StorageFull
from layerstream.hardware.reader import DirectReader
from layerstream.kv.keys import snapshot_key
from layerstream.store import archive, maintenance
from layerstream.store.answers import RememberedAnswer
from layerstream.store.tiers.folder import Bounds, StoreFolder
from layerstream.store.tiers.local import LocalTier

from tests.store.pages import ROOMY, chain, new_pages, read_back
from tests.store.snapshots import expected_state, new_snapshot

NAME = "a" * 40
ABOUT: dict[str, Any] = {"model": "test", "fingerprint": {"layout": {"page_tokens": 4}, "weights": ["x"]}}
CHAINS = [chain("root", number) for number in range(8)]


def open_tier(path: Path, bounds: Bounds = ROOMY, namespace: str = NAME) -> LocalTier:
    return LocalTier(StoreFolder(path), namespace, ABOUT, bounds, DirectReader(1))


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A chain of one page, eight that continue it; one pinned; two answers."""
    tier = open_tier(tmp_path / "from")
    tier.put(new_pages(CHAINS[0][:1]))
    for keys in CHAINS:
        tier.put(new_pages(keys[1:], keys[0]))
    tier.pin(CHAINS[2][1:])
    tier.remember(RememberedAnswer(b"", (1, 2), (3,)))
    tier.remember(RememberedAnswer(CHAINS[3][1], (4,), (5, 6)))
    (summary,) = maintenance.summarise(tier.folder)
    assert maintenance.export(tier.folder, summary, tmp_path / "out.tar") == 9
    tier.close()
    return tmp_path / "out.tar"


def take_over(path: Path, tar: Path, bounds: Bounds = ROOMY) -> maintenance.Imported:
    folder = StoreFolder(path)
    try:
        done = maintenance.import_(folder, tar, NAME, ABOUT, bounds)
        folder.index.check_integrity()
        assert folder.total_bytes() == sum(found.stat().st_size for found in path.rglob("*.kv"))
        return done
    finally:
        folder.close()
        assert not [*path.rglob("*.tmp")]


def test_pins_and_answers_come_along(tar: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(tar.stat().st_mode) == 0o600
    assert take_over(tmp_path / "to", tar) == maintenance.Imported(9, 0, 0, 0)
    assert take_over(tmp_path / "to", tar) == maintenance.Imported(0, 9, 0, 0)
    tier = open_tier(tmp_path / "to")
    assert [row.pinned for row in tier.folder.index.segments()].count(1) == 1
    assert tier.recall([b"", CHAINS[3][1]]) == [[4, 5, 6], [1, 2, 3]]
    assert all(len(tier.contains(keys)) == 2 for keys in CHAINS)
    tier.close()


def test_snapshots_come_along(tmp_path: Path) -> None:
    """Those of pages, and those that continue nothing, as where all layers are recurrent."""
    (page,), (other,) = chain("page"), chain("other")
    tier = open_tier(tmp_path / "from")
    tier.put(new_pages([page]))
    tier.put(new_snapshot(page))
    tier.put(replace(new_snapshot(other), parent=b"", pinned=True))
    (summary,) = maintenance.summarise(tier.folder)
    assert (summary.pages, summary.snapshots, summary.tokens) == (1, 2, 4)
    assert maintenance.export(tier.folder, summary, tmp_path / "out.tar") == 3
    tier.close()
    assert take_over(tmp_path / "to", tmp_path / "out.tar") == maintenance.Imported(3, 0, 0, 0)
    tier = open_tier(tmp_path / "to")
    for key in (page, other):
        assert read_back(tier, [snapshot_key(key)]) == expected_state(key)
    assert [(row.is_snapshot, row.pinned) for row in tier.folder.index.segments()].count((1, 1)) == 1
    tier.close()


def test_the_bound_is_kept_and_what_was_taken_over_is_not_evicted_for_more(tar: Path, tmp_path: Path) -> None:
    size = max(member.size for member in segments(tar))
    for count in (0, 1, 4):
        path = tmp_path / f"to{count}"
        done = take_over(path, tar, Bounds(count * size, 0))
        assert (done.new, done.without_room) == (count, 9 - count)
        assert sum(found.stat().st_size for found in path.rglob("*.kv")) <= count * size


def test_nothing_is_evicted_for_what_is_damaged(tar: Path, tmp_path: Path) -> None:
    data = bytearray(tar.read_bytes())
    for member in segments(tar):
        data[member.offset_data + 5] ^= 1
    tar.write_bytes(data)
    tier = open_tier(tmp_path / "to")
    size = tier.put(new_pages(chain("mine")))
    tier.close()
    assert take_over(tmp_path / "to", tar, Bounds(size, 0)) == maintenance.Imported(0, 0, 9, 0)
    tier = open_tier(tmp_path / "to")
    assert len(tier.contains(chain("mine"))) == 1
    tier.close()


def segments(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as found:
        return [member for member in found if member.name.endswith(".kv")]


def repack(tar: Path, **texts: bytes | None) -> None:
    """Replace members."""
    with tarfile.open(tar) as old:
        members = {member.name: old.extractfile(member).read() for member in old}  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as new:
        for name, data in {**members, **{f"{name}.json": text for name, text in texts.items()}}.items():
            if data is not None:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "texts",
    [
        {"about": None},
        {"about": b""},
        {"about": b"\xff\xfe"},
        {"about": b"[]"},
        {"about": b"{}"},
        {"about": b'{"fingerprint": []}'},
        {"about": b'{"fingerprint": {"layout": 3}}'},
        {"about": b"[" * 100_000},
        {"about": b'{"model": ' + b"9" * 5000 + b"}"},
        {"about": b" " * (archive.MOST_ABOUT_BYTES + 1)},
        {"kept": b"{}"},
        {"kept": b'{"pinned": 3, "answers": []}'},
        {"kept": b'{"pinned": [], "answers": [{}]}'},
        {"kept": b'{"pinned": [], "answers": [{"prefix": "zz", "question": [], "answer": []}]}'},
        {"kept": b'{"pinned": [], "answers": [{"prefix": "", "question": [-1], "answer": []}]}'},
        {"kept": b'{"pinned": [], "answers": [{"prefix": "", "question": [1.5], "answer": [true]}]}'},
    ],
)
def test_what_makes_no_sense_is_refused_in_our_words(texts: dict[str, bytes | None], tar: Path, tmp_path: Path) -> None:
    repack(tar, **texts)
    with pytest.raises(KVStoreUnusable):
        take_over(tmp_path / "to", tar)
    assert not [*(tmp_path / "to").rglob("*.kv")]


@pytest.mark.parametrize("length", [0, 100, 600, 2000, 20_000])
def test_a_file_that_was_cut_off(length: int, tar: Path, tmp_path: Path) -> None:
    os.truncate(tar, length)
    with pytest.raises(KVStoreUnusable):
        take_over(tmp_path / "to", tar)


def test_another_tenants(tar: Path, tmp_path: Path) -> None:
    folder = StoreFolder(tmp_path / "to")
    with pytest.raises(KVStoreUnusable, match="another tenant"):
        maintenance.import_(folder, tar, "b" * 40, ABOUT, ROOMY)
    assert not folder.index.namespaces(), "nothing was begun"
    folder.close()


def test_an_archive_of_an_older_version_has_no_pins(tar: Path, tmp_path: Path) -> None:
    repack(tar, kept=None)
    assert take_over(tmp_path / "to", tar).new == 9


@pytest.mark.parametrize("at", [0, 2, 6])  # then a file is synced, and between them its folder
def test_a_disk_that_fills_up_leaves_nothing_half_done(
    at: int, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, sync = iter(range(100)), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(archive.os, "fsync", full)
        with pytest.raises(StorageFull, match="disk is full"):
            take_over(tmp_path / "to", tar)
    assert take_over(tmp_path / "to", tar) == maintenance.Imported(9 - at // 2, at // 2, 0, 0)


def test_an_export_that_fails_leaves_nothing(tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = StoreFolder(tmp_path / "from")
    (summary,) = maintenance.summarise(folder)
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(StorageFull):
        maintenance.export(folder, summary, tmp_path / "again.tar")
    assert not (tmp_path / "again.tar").exists()
    with pytest.raises(FileExistsError):
        maintenance.export(folder, summary, tar)
    folder.close()

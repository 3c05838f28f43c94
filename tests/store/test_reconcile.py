"""Whoever died when, and whatever became of the index: what lies in a folder is known, bounded and cleared."""

from __future__ import annotations

import os
import sqlite3
import stat
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from layerstream.kv.keys import snapshot_key
from layerstream.store import maintenance
from layerstream.store.answers import Answers, RememberedAnswer
from layerstream.store.database import IndexReplaced
from layerstream.store.index import Index
from layerstream.store.tiers.folder import Access, Bounds, StoreFolder, StoreUnavailable

from tests.store.pages import chain, expected, new_pages, open_tier, read_back
from tests.store.snapshots import expected_state, new_snapshot

CHAINS = [chain("a", number) for number in range(4)]
OTHER = "b" * 40


def fill(path: Path) -> None:
    """Two tenants, each with five segments of one page, of which four continue the first, and a snapshot; a pin, an
    answer."""
    for namespace in ("a" * 40, OTHER):
        tier = open_tier(path, namespace)
        tier.put(new_pages(CHAINS[0][:1]))
        for keys in CHAINS:
            tier.put(new_pages(keys[1:], keys[0]))
        tier.put(new_snapshot(CHAINS[2][1]))
        tier.pin(CHAINS[1])
        tier.remember(RememberedAnswer(b"", (1, 2), (3,)))
        tier.close()


def forget_rows(path: Path) -> None:
    """As after kills between the renames and the index entries."""
    connection = sqlite3.connect(path / "index.sqlite")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("DELETE FROM segments WHERE id % 2 = 0 OR namespace > 1")
    connection.commit()
    connection.close()


def break_half(path: Path) -> None:
    """A rebuild that was killed: a whole schema, and a part of the rows."""
    (path / "index.sqlite").unlink()
    half = Index(path / "index.sqlite")
    half.namespace_id("a" * 40, "{}")
    half.close()


def drop(path: Path, *tables: str) -> None:
    connection = sqlite3.connect(path / "index.sqlite")
    for table in tables:
        connection.execute(f"DROP TABLE {table}")
    connection.commit()
    connection.close()


def forget_descriptions(path: Path) -> None:
    for found in (path / "index.sqlite", *path.glob("*/about.json")):
        found.unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "rows are missing": forget_rows,
    "the index is empty": lambda path: os.truncate(path / "index.sqlite", 0),
    "the index is gone": lambda path: (path / "index.sqlite").unlink(),
    "the index is garbage": lambda path: (path / "index.sqlite").write_bytes(os.urandom(9000)),
    "a rebuild was killed": break_half,
    "tables are gone": lambda path: drop(path, "answers", "pages", "leases"),
    "one table is gone": lambda path: drop(path, "numbers"),
    "descriptions are gone": forget_descriptions,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_everything_is_found_again(damage: str, tmp_path: Path) -> None:
    fill(tmp_path / "kv")
    DAMAGE[damage](tmp_path / "kv")
    tier = open_tier(tmp_path / "kv")
    tier.folder.index.check_integrity()
    assert tier.folder.total_bytes() == sum(path.stat().st_size for path in (tmp_path / "kv").rglob("*.kv"))
    for keys in CHAINS:
        assert len(tier.contains(keys)) == 2
        assert all(data == expected(key, layer) for (key, layer), data in read_back(tier, keys).items())
    assert read_back(tier, [snapshot_key(CHAINS[2][1])]) == expected_state(CHAINS[2][1])
    assert len(tier.folder.index.segments()) == 12
    for summary in maintenance.summarise(tier.folder):
        assert (summary.pages, summary.snapshots) == (5, 1)
        assert 2 * summary.snapshot_bytes < summary.num_bytes
    tier.close()


@pytest.mark.parametrize("access", [Access(), Access(has_files_only=True)], ids=["index", "files"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_survives_clear(damage: str, access: Access, tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path)
    DAMAGE[damage](path)
    (path / OTHER / f"{2**22 + 1}-dead-segment.tmp").write_bytes(b"KV")
    for how in (access, Access()):
        folder = StoreFolder(path, how)
        for summary in maintenance.summarise(folder):
            maintenance.clear(folder, summary)
        assert not folder.index.segments()
        folder.close()
    assert sorted(found.name for found in path.iterdir()) == ["index.sqlite", "layerstream-kv.json"]
    assert array("I", [1, 2]).tobytes() not in (path / "index.sqlite").read_bytes(), "nor what was asked"


def test_files_that_are_gone_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path)
    for found in (path / OTHER).glob("*.kv"):
        found.unlink()
    folder = StoreFolder(path)
    assert folder.total_bytes() == sum(found.stat().st_size for found in path.rglob("*.kv"))
    folder.index.check_integrity()
    folder.close()


def test_what_is_not_a_segment_goes(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path)
    whole = next((path / OTHER).glob("*.kv"))
    (path / OTHER / f"copy-{whole.name}").write_bytes(whole.read_bytes())
    (path / OTHER / "junk.kv").write_bytes(b"junk")
    for namespace in ("a" * 40, OTHER):
        (path / namespace / "strange.kv").write_bytes(whole.read_bytes()[:-8])
    StoreFolder(path).close()
    assert len([*path.rglob("*.kv")]) == 12


def test_all_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    before = os.umask(0)
    try:
        fill(path)
        tier = open_tier(path)
        modes = {found.name: stat.S_IMODE(found.stat().st_mode) for found in (path, *path.rglob("*"))}
        assert set(modes.values()) == {0o600, 0o700}, modes
        tier.close()
        (path / "index.sqlite").chmod(0o644)
        open_tier(path).close()
        assert stat.S_IMODE((path / "index.sqlite").stat().st_mode) == 0o600, "also of an older version"
    finally:
        os.umask(before)


class TestReplaced:
    """What is not what was opened is not used."""

    @pytest.mark.parametrize("change", ["removed", "another"])
    def test_the_index(self, change: str, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "kv")
        tier.put(new_pages(CHAINS[0]))
        (tmp_path / "kv" / "index.sqlite").unlink()
        if change == "another":
            StoreFolder(tmp_path / "kv").close()
        for use in (tier.contains, tier.claim, lambda keys: tier.put(new_pages(keys))):
            with pytest.raises(IndexReplaced):
                use(CHAINS[0])
        tier.close()

    def test_a_namespace(self, tmp_path: Path) -> None:
        """``kv clear`` of tenant A while A runs; B comes: nothing of A's is B's, and A opens anew."""
        one = open_tier(tmp_path / "kv")
        one.put(new_pages(CHAINS[0]))
        folder = StoreFolder(tmp_path / "kv")
        for summary in maintenance.summarise(folder):
            maintenance.clear(folder, summary)
        folder.close()
        other = open_tier(tmp_path / "kv", OTHER)
        assert other._number != one._number, "ids are not used again"
        with pytest.raises((IndexReplaced, sqlite3.IntegrityError)):
            one.remember(RememberedAnswer(b"", (7, 7), (8,)))
        with pytest.raises(IndexReplaced):
            one.claim(CHAINS[0])
        with pytest.raises(IndexReplaced):
            one.put(new_pages(CHAINS[1]))
        assert other.recall([b""]) == []
        assert not [*(tmp_path / "kv").rglob("*.kv")]
        for tier in (one, other):
            tier.close()

    def test_an_answer_carries_its_tenant(self, tmp_path: Path) -> None:
        one = open_tier(tmp_path / "kv")
        answers = Answers(one.folder.index)
        answers.remember(one._number, one.namespace, RememberedAnswer(b"", (7,), (8,)))
        assert answers.recall(one._number, one.namespace, [b""]) == [[7, 8]]
        assert answers.recall(one._number, OTHER, [b""]) == []
        one.close()


def test_ids_are_counted_on(tmp_path: Path) -> None:
    index = Index(tmp_path / "i")
    seen: list[int] = []
    for number in range(5):
        namespace = index.namespace_id(f"n{number}") or 0
        seen += [namespace, index.reserve(namespace, "s", 1) or 0]
        index.remove_namespace(f"n{number}")
    index.close()
    assert len(set(seen)) == 10


@pytest.mark.parametrize("version", [2, 3])
def test_an_index_of_a_version_before(version: int, tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path)
    connection = sqlite3.connect(path / "index.sqlite")
    connection.execute("ALTER TABLE segments DROP COLUMN is_snapshot")
    connection.execute("DROP TABLE retrieved")
    connection.execute("DROP TABLE retrievers")
    if version < 3:
        connection.execute("DROP TABLE numbers")
        connection.execute("ALTER TABLE answers DROP COLUMN tenant")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()
    tier = open_tier(path)
    assert tier.recall([b""]) == [[1, 2, 3]]
    rows = tier.folder.index.segments()
    assert sum(row.pinned for row in rows) == 4
    assert (tier.folder.index.namespace_id("new") or 0) > max(row.segment for row in rows)
    tier.close()


def test_locked_by_another(tmp_path: Path) -> None:
    fill(tmp_path / "kv")
    other = sqlite3.connect(tmp_path / "kv" / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="another process is writing to it"):
        StoreFolder(tmp_path / "kv", Access(busy_seconds=0.01))
    other.close()
    StoreFolder(tmp_path / "kv").close()


def test_prune_leaves_what_is_pinned(tmp_path: Path) -> None:
    fill(tmp_path / "kv")
    folder = StoreFolder(tmp_path / "kv")
    before = folder.total_bytes()
    assert maintenance.prune(folder, 0) == before - folder.total_bytes() > 0
    assert all(row.pinned for row in folder.index.segments())
    assert not folder.make_room(0, Bounds(0, 0))
    folder.close()

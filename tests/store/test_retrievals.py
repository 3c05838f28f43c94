"""How often documents were retrieved: fading, for each tenant alone, bounded, in the index that processes share."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream import ConfigurationError, KVStoreConfig, LayerStream
from layerstream.store import retrievals
from layerstream.store.index import Index
from layerstream.store.maintenance import clear, summarise
from layerstream.store.migrations import STEPS, migrate
from layerstream.store.popularity import Popularity
from layerstream.store.retrievals import HALF_LIFE, RecentRetrievals, StoredRetrievals, retrieval
from layerstream.store.tiers.folder import StoreFolder

from tests.store.memory_tier import MemoryTier, open_store
from tests.store.pages import open_tier
from tests.store.test_outage import eventually

Counts = RecentRetrievals | StoredRetrievals


@pytest.fixture(params=["memory", "index"])
def counts(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "memory":
        yield RecentRetrievals()
        return
    index = Index(tmp_path / "index.sqlite")
    yield StoredRetrievals(index)
    index.close()


def of(counts: Counts, *texts: str, tenant: str = "") -> list[float]:
    return counts.counts(retrieval("", tenant, texts))


def note(counts: Counts, *texts: str, tenant: str = "") -> None:
    counts.note(retrieval("", tenant, texts))


def test_counts(counts: Counts) -> None:
    assert of(counts, "a") == [0.0]
    note(counts, "a", "b", "a")
    note(counts, "a")
    assert of(counts, "a", "b", "c") == pytest.approx([2.0, 1.0, 0.0], abs=0.02)


def test_halves_while_others_are_retrieved(counts: Counts) -> None:
    note(counts, "a")
    for _ in range(int(HALF_LIFE)):
        note(counts, "b")
    assert of(counts, "a") == pytest.approx([0.5])
    assert of(counts, "b")[0] == pytest.approx(sum(2 ** (-age / HALF_LIFE) for age in range(int(HALF_LIFE))))


def test_tenants_have_their_own_counts_and_clocks(counts: Counts) -> None:
    note(counts, "a", tenant="one")
    for _ in range(20):
        note(counts, "a", tenant="other")
    assert of(counts, "a", tenant="one") == [1.0]
    assert of(counts, "a", tenant="third") == [0.0]
    assert of(counts, "a") == [0.0]


def test_bounded(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrievals, "MOST_DOCUMENTS", 4)
    monkeypatch.setattr(retrievals, "TRIMMED_EVERY", 1)
    for number in range(9):
        note(counts, str(number), tenant=str(number % 2))
    assert sum(of(counts, *map(str, range(9)), tenant="0")) + sum(of(counts, *map(str, range(9)), tenant="1")) > 3.9
    assert of(counts, "0", "4", tenant="0") == [0.0, 0.0]
    assert of(counts, "8", tenant="0") == [1.0]


@given(st.lists(st.sets(st.sampled_from("abcd")), max_size=30), st.sampled_from([1.0, 10.0, 1e3]))
def test_weights_are_the_faded_sums(asked: list[set[str]], half_life: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrievals, "HALF_LIFE", half_life)
        counts = RecentRetrievals()
        for texts in asked:
            note(counts, *sorted(texts))
        for text, found in zip("abcd", of(counts, *"abcd"), strict=True):
            ages = [len(asked) - at for at, texts in enumerate(asked, 1) if text in texts]
            assert found == pytest.approx(sum(2 ** (-age / half_life) for age in ages))


def test_no_text_is_kept(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    note(StoredRetrievals(index), "a secret passage", tenant="a secret tenant")
    index.close()
    assert b"secret" not in (tmp_path / "index.sqlite").read_bytes()
    assert retrieval("salt", "", ["a"]) != retrieval("", "salt", ["a"])
    assert retrieval("s", "t", ["a"]) != retrieval("", "st", ["a"])


def test_an_older_index_gains_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr("layerstream.store.migrations.STEPS", STEPS[:4])
        Index(path).close()
    old = Index(path, read_only=True)
    assert of(StoredRetrievals(old), "a") == [0.0], "nobody may write to it"
    old.close()
    new = Index(path)
    note(StoredRetrievals(new), "a")
    new.close()
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, path)
    assert connection.execute("SELECT count(*) FROM retrieved").fetchone() == (1,)


def _count_many(path: Path) -> None:
    index = Index(path)
    for _ in range(50):
        note(StoredRetrievals(index), "a")
    index.close()


def test_processes_that_count_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    Index(path).close()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count_many, args=(path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    index = Index(path)
    assert index.connection().execute("SELECT retrievals FROM retrievers").fetchone() == (100,)
    assert of(StoredRetrievals(index), "a")[0] == pytest.approx(sum(2 ** (-age / HALF_LIFE) for age in range(100)))
    index.close()


def test_what_was_counted_while_the_store_was_off_is_written_when_it_is_there_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerstream.store.outage.FIRST_SECONDS", 0.2)
    tier = MemoryTier()
    store = open_store(tier)
    popularity = Popularity(store)
    tier.errors["recall"] = OSError("the disk is full")
    store.recall([], 1)
    popularity.note(["a"])
    assert popularity.of(["a", "b"]) == [1.0, 0.0], "from memory"
    assert of(tier.retrievals, "a") == [0.0]
    del tier.errors["recall"]
    eventually(lambda: store.tier is not None)
    popularity.note(["a"])
    assert popularity.of(["a"]) == of(tier.retrievals, "a")
    assert of(tier.retrievals, "a")[0] > 1.9
    store.close()


def test_clearing_the_last_model_forgets_the_counts(tmp_path: Path) -> None:
    for name in ("a" * 40, "b" * 40):
        open_tier(tmp_path / "kv", name).close()
    folder = StoreFolder(tmp_path / "kv")
    counted = StoredRetrievals(folder.index)
    note(counted, "a")
    first, second = summarise(folder)
    clear(folder, first)
    assert of(counted, "a") == [1.0]
    clear(folder, second)
    assert of(counted, "a") == [0.0]
    folder.close()


def test_an_engine_counts_and_the_next_one_knows(tmp_path: Path) -> None:
    for expected in (1.0, 2.0):
        with LayerStream("demo", kv_store=KVStoreConfig(tmp_path), progress=False) as engine:
            engine.note_retrieved(["a passage"])
            assert engine.popularity(["a passage", "another"]) == pytest.approx([expected, 0.0], abs=0.02)
            assert engine.popularity(["a passage"], tenant="somebody else") == [0.0]
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        engine.note_retrieved(["a passage"])
        assert engine.popularity(["a passage"]) == [1.0]
        engine.note_retrieved([])
        assert engine.popularity([]) == []
        for wrong in ("a passage", [1]):
            with pytest.raises(ConfigurationError, match="texts is"):
                engine.note_retrieved(wrong)  # type: ignore[arg-type]

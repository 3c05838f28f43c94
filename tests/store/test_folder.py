"""One folder becomes a store under many hands, some of which die."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from layerstream import KVStoreUnusable
from layerstream.store.tiers.folder import INDEX, MARKER, StoreFolder

DIES_AT_THE_MARKER = """
import os, signal, sys
from pathlib import Path
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from layerstream.store.tiers.folder import StoreFolder
StoreFolder(Path(sys.argv[1]))
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(("-wal", "-shm"))}


def test_another_opens_it_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the marker's temporary file and its rename."""
    others: list[StoreFolder] = []
    replace = os.replace

    def open_another_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        assert names(tmp_path / "kv") == {Path(source).name}
        with ThreadPoolExecutor(1) as another:
            others.append(another.submit(StoreFolder, tmp_path / "kv").result())
        replace(source, target)

    monkeypatch.setattr(os, "replace", open_another_first)
    one = StoreFolder(tmp_path / "kv")
    assert len(others) == 1
    assert one.total_bytes() == others[0].total_bytes() == 0
    assert names(tmp_path / "kv") == {MARKER, INDEX}
    for folder in (one, *others):
        folder.close()


def test_many_open_it_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            for folder in pool.map(StoreFolder, [tmp_path / f"kv{turn}"] * 8):
                folder.close()
            assert names(tmp_path / f"kv{turn}") == {MARKER, INDEX}


def test_its_maker_was_killed(tmp_path: Path) -> None:
    """What is left is no stranger's, and is swept away."""
    maker = subprocess.run([sys.executable, "-c", DIES_AT_THE_MARKER, str(tmp_path / "kv")], timeout=60)
    assert maker.returncode == -9
    assert len(names(tmp_path / "kv")) == 1
    StoreFolder(tmp_path / "kv").close()
    assert names(tmp_path / "kv") == {MARKER, INDEX}


def test_somebody_elses_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tmp").write_text("precious")
    with pytest.raises(KVStoreUnusable, match=r"holds other things \(thesis.tmp\)"):
        StoreFolder(tmp_path)
    assert names(tmp_path) == {"thesis.tmp"}

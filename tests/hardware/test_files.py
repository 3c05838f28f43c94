"""Small files, written by many, and by some that cannot."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from layerstream.hardware.files import TEMPORARY, temporary_path, write_whole, writer_of


def test_many_write_it_and_each_read_is_one_of_theirs(tmp_path: Path) -> None:
    path, texts = tmp_path / "about.json", [str(number) * 5_000 for number in range(8)]
    write_whole(path, texts[0])
    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(write_whole, path, text) for text in texts * 20]
        found = {path.read_text() for _ in range(100)}
        for one in writing:
            one.result()
    assert found <= set(texts)
    assert [*tmp_path.iterdir()] == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "about.json"
    write_whole(path, "first")

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "second")
    assert path.read_text() == "first"
    assert [*tmp_path.iterdir()] == [path]


def test_a_temporary_file_says_whose_it_is(tmp_path: Path) -> None:
    ours = temporary_path(tmp_path / "a-b.json")
    assert ours.parent == tmp_path
    assert ours.name.endswith(f"-a-b.json{TEMPORARY}")
    assert writer_of(ours) == os.getpid()
    assert writer_of(tmp_path / "thesis.tmp") is None

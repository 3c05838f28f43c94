"""``layerstream kv`` and ``layerstream warm`` as a user calls them."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from layerstream.cli import app
from typer.testing import CliRunner

from tests.store.pages import chain, new_pages, open_tier
from tests.store.snapshots import new_snapshot

TEXT = "Mira Velk approves travel at the Brenvik office before the tenth of the month. " * 20


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERSTREAM_KV_STORE", str(tmp_path / "kv"))
    return tmp_path / "kv"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "travel.md").write_text(TEXT)
    (folder / "food.txt").write_text("The kitchen opens at noon. " * 30)
    return folder


def run(*arguments: object, columns: str = "80") -> Result:
    return CliRunner(env={"COLUMNS": columns}).invoke(app, [str(argument) for argument in arguments])


def warm(docs: Path, *more: object) -> Result:
    result = run("warm", "--docs", docs, *more)
    assert result.exit_code == 0, result.output
    return result


def test_warm_says_what_it_takes_and_does_it_once(docs: Path, store: Path) -> None:
    dry = warm(docs, "--dry-run").stdout
    assert "to compute" in dry
    assert not [*store.rglob("*.kv")]
    first = warm(docs).stdout
    assert "tokens/s" in first
    assert "all stored already" in warm(docs).stdout


def test_warm_within_a_budget(docs: Path) -> None:
    forecast = warm(docs, "--dry-run").stdout
    assert "of later prompts are reused" in forecast
    some = warm(docs, "--top", 1, "--dry-run").stdout
    assert re.match(r"1 of \d+ passages, ", some)
    assert "of later prompts" not in some, "nothing was retrieved yet"
    assert run("warm", "--docs", docs, "--budget", "1KB").exit_code == 1
    warm(docs, "--top", 1)
    assert "all stored already" in warm(docs, "--top", 1).stdout
    assert "to compute" in warm(docs, "--dry-run").stdout


def test_warmed_documents_are_found_by_ask(docs: Path) -> None:
    warm(docs, "--whole")
    result = run("ask", "--docs", docs, "--max-tokens", 4, "Who approves travel?")
    assert result.exit_code == 0
    assert re.search(r"tokens \+ \d+ cached", result.stderr)


def test_ls(docs: Path) -> None:
    assert "there is no KV store yet" in run("kv", "ls").output
    warm(docs)
    result = run("kv", "ls")
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[:-1])
    header, row, *_ = result.stdout.splitlines()
    assert header.split() == ["id", "model", "tokens", "size", "pinned", "answers", "hits", "last", "used"]
    assert row.split()[1] == "demo"


def test_snapshots_are_shown_apart(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "kv")
    (key,) = chain("page")
    tier.put(new_pages([key]))
    tier.put(new_snapshot(key))
    tier.close()
    header, row, *_ = run("kv", "ls", "--store", tmp_path / "kv").stdout.splitlines()
    assert header.split()[:5] == ["id", "model", "tokens", "snapshots", "size"]
    assert "1, 12" in row
    for path in (tmp_path / "kv").rglob("*.kv"):
        path.write_bytes(b"?" + path.read_bytes()[1:])
    found = run("kv", "verify", "--store", tmp_path / "kv")
    assert found.exit_code == 1
    assert "1 of 1 pages differ" in found.stdout


def test_verify_drops_damage(docs: Path, store: Path) -> None:
    warm(docs)
    assert run("kv", "verify").exit_code == 0
    path = max(store.rglob("*.kv"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    result = run("kv", "verify")
    assert result.exit_code == 1
    assert "1 of 64 pages differ" in result.stdout
    assert "damaged" in result.stdout, "it, and what follows from it"
    assert run("kv", "verify").exit_code == 0
    assert "to compute" in warm(docs).stdout


def test_prune_and_clear(docs: Path, store: Path) -> None:
    warm(docs)
    assert "0 B freed" in run("kv", "prune", "--to", "1GB").stdout
    assert run("kv", "prune", "--to", "1KiB").exit_code == 0
    pruned = run("kv", "prune", "--to", "1KiB").stdout
    assert "are pinned" in pruned
    assert "layerstream kv clear" in pruned
    assert [*store.rglob("*.kv")], "what was warmed is pinned"
    assert "holds nothing for 'other'" in run("kv", "clear", "other").output
    result = run("kv", "clear", "demo")
    assert "0 B left" in result.stdout
    assert not [*store.rglob("*.kv")]
    assert run("kv", "ls").exit_code == 0


def test_a_corpus_moves_to_another_machine(docs: Path, store: Path, tmp_path: Path) -> None:
    warm(docs)
    tar = tmp_path / "corpus.tar"
    assert run("kv", "export", "demo", tar).exit_code == 0
    assert "is there already" in run("kv", "export", "demo", tar).output
    count = len([*store.rglob("*.kv")])
    shutil.rmtree(store)
    assert f"{count} segments are new" in run("kv", "import", tar, "--model", "demo").stdout
    assert "0 segments are new" in run("kv", "import", tar, "--model", "demo").stdout
    assert "all stored already" in warm(docs).stdout


def test_what_this_machine_would_compute_otherwise_is_refused(docs: Path, tmp_path: Path) -> None:
    warm(docs)
    tar = tmp_path / "corpus.tar"
    run("kv", "export", "demo", tar)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        result = run("kv", "import", tar, "--model", "demo", "--store", tmp_path / "other")
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 2
    assert f"arithmetic.threads: {threads + 1}, there {threads}" in result.output


def test_clear_asks_on_a_terminal(docs: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm(docs)
    monkeypatch.setattr(sys.modules["layerstream.cli.kv"], "_is_terminal", lambda: True)
    for answer, is_there in (("n", True), ("y", False)):
        result = CliRunner().invoke(app, ["kv", "clear"], input=answer)
        assert "remove what is stored for demo" in result.output
        assert bool([*store.rglob("*.kv")]) == is_there
    warm(docs)
    assert "remove" not in run("kv", "clear", "--yes").output
    assert not [*store.rglob("*.kv")]


def test_clear_says_what_it_spares(docs: Path, store: Path) -> None:
    from layerstream.store.tiers.locks import open_locked

    warm(docs)
    reading = open_locked(max(store.rglob("*.kv"), key=lambda path: path.stat().st_size))
    assert "stay, as an engine is reading them" in run("kv", "clear").stdout
    assert [*store.rglob("*.kv")]
    os.close(reading)
    assert "0 B left" in run("kv", "clear").stdout


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), OSError(28, "No space left on device")])
def test_a_full_disk_can_be_seen_and_cleared(
    error: Exception, docs: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerstream.store.index import Index

    warm(docs)
    open_index = Index.__init__

    def full(self: Index, path: Path | None, **options: object) -> None:
        if path is not None and [*store.rglob("*.kv")]:
            raise error
        open_index(self, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Index, "__init__", full)
    assert "demo" in (listed := run("kv", "ls")).stdout
    assert "this is what the files say" in listed.output
    refused = run("kv", "prune", "--to", "1KB")
    assert refused.exit_code == 2
    assert "cannot be used as a KV store" in refused.output
    assert run("kv", "clear", "demo").exit_code == 0
    assert run("kv", "ls").stdout.count("\n") == 1


def test_read_only_is_seen_and_not_changed(docs: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm(docs)
    monkeypatch.setattr("layerstream.store.tiers.folder.os.access", lambda *_: False)
    assert "demo" in run("kv", "ls").stdout
    assert run("kv", "verify").exit_code == 0
    for command in (("clear",), ("prune", "--to", "1KB")):
        result = run("kv", *command)
        assert result.exit_code == 2
        assert "is read-only" in result.output
    assert [*store.rglob("*.kv")]


def test_not_an_export(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar")
    result = run("kv", "import", tmp_path / "x.tar", "--model", "demo")
    assert result.exit_code == 2
    assert "not an export" in result.output

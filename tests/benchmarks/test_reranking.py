"""The benchmark of reranking runs, and both runners give the same scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import reranking


@pytest.mark.parametrize("runner", reranking.RUNNERS)
def test_a_child_scores(runner: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    given = ["reranking", str(folder), "--passages", "5", "--tokens", "40", "--batch", "2", "--memory", "256MiB"]
    monkeypatch.setattr(sys, "argv", [*given, "--child", runner])
    reranking.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["scores"]) == 5
    other = reranking.RUNNERS[runner == reranking.RUNNERS[0]]
    monkeypatch.setattr(sys, "argv", [*given, "--child", other])
    reranking.main()
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["scores"] == pytest.approx(again["scores"], abs=1e-5)


def test_the_table(folder: Path, capsys) -> None:
    options = type("Options", (), {"model": folder, "passages": 2, "tokens": 3, "cgroup": "3GiB"})
    one = {"open_seconds": 1.0, "seconds": 2.0, "sweeps": 3, "tokens_in": 9, "scores": [0.1, 0.2]}
    reranking.report({"a": [one], "b": [{**one, "scores": [0.1, 0.3]}]}, options)  # type: ignore[arg-type]
    assert "1.0e-01" in capsys.readouterr().out

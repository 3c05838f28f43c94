"""``layerstream plan``: what is wrong is said before anything is measured, and what is much is said in the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream.cli import app
from layerstream.measuring import rates as probe
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import plan_facts, plan_model, spend
from typer.testing import CliRunner


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(probe, "rates_for", fail)


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no/such/plan.png", "there is no folder"),
        ("plan.doc", "a picture's name ends with one of"),
        ("plan", "a picture's name ends with one of"),
        ("folder.png", "cannot be written"),
        ("file/plan.png", "there is no folder"),
    ],
)
def test_where_a_picture_cannot_go_is_said_first(folder: Path, tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["plan", str(folder), "--memory", "64MiB", "--plot", str(tmp_path / place)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not result.stdout


def test_a_budget_beyond_the_machines_memory_is_said(folder: Path) -> None:
    plan, _, _ = plan_model(EngineConfig(str(folder), memory_bytes=999 * 2**40))
    first = str(plan).splitlines()[0]
    assert first.startswith("budget")
    assert "that are free here" in first
    assert len(first) <= 80
    plan, _, _ = plan_model(EngineConfig(str(folder), memory_bytes=64 * 2**20))
    assert "free here" not in str(plan)


def test_host_memory_beyond_the_machines_is_said(folder: Path) -> None:
    config = EngineConfig(str(folder), device="cuda", memory_bytes=2**30, host_memory_bytes=999 * 2**40)
    rows = str(spend(config, plan_facts(config)[0])).splitlines()
    assert ["free here" in row for row in rows if row.startswith("host memory")] == [True]


@pytest.mark.parametrize(
    ("wanted", "is_said"), [(10**9, True), (1025, True), (1024, False), (100, False), (None, False)]
)
def test_a_context_beyond_the_models_is_said(folder: Path, wanted: int | None, is_said: bool) -> None:
    plan, _, _ = plan_model(EngineConfig(str(folder), memory_bytes=2**30, max_context=wanted))
    assert plan.facts.context_length == min(1024, wanted or 1024)
    said = [row for row in str(plan).splitlines() if row.startswith("context")]
    assert bool(said) == is_said
    assert all(f"{wanted:,} were asked for" in row and "1,024" in row for row in said)

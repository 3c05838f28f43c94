"""The stages for a card run on a pretended one: what they find is said, and what fails is said too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from layerstream.measuring import rates

from benchmarks import on_a_card
from benchmarks.card import stages
from benchmarks.card.shapes import TINY, Model
from benchmarks.grow import main as grow
from tests.harness import shrink_units
from tests.pretend import pretend_cuda


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models."""
    work = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patches:
        for name, model in TINY.models.items():
            patches.setattr("sys.argv", ["grow", model.shape, str(work / name), *model.arguments()])
            grow()
    return work


@pytest.fixture
def bench(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stages.Bench]:
    shrink_units(monkeypatch)
    monkeypatch.setattr(rates, "LINK_BYTES", 2**20)
    with pretend_cuda(monkeypatch):
        yield stages.Bench("", TINY, work, tmp_path)


QUICK = {"link", "kernels", "bf16", "peers_resident"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in stages.STAGES]
)
def test_every_stage_says_what_it_finds(name: str, bench: stages.Bench, capsys: pytest.CaptureFixture[str]) -> None:
    stages.STAGES[name](dataclasses.replace(bench, stage=name))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"stage"')]
    assert said
    assert all(line["stage"] == name and line["what"] for line in said)


def test_every_stage_is_run_and_every_model_is_known() -> None:
    assert {stage.name for stage in on_a_card.STAGES} == stages.STAGES.keys()
    assert {stage.model for stage in on_a_card.STAGES} - {None} == TINY.models.keys()


def test_a_stage_without_its_model_or_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = dataclasses.replace(TINY, models={"dense": Model("1,1,1,1,1,1")})
    monkeypatch.setattr(on_a_card, "TINY", setting)
    monkeypatch.setattr(on_a_card, "WRITING_SECONDS", 0.0)
    assert on_a_card.main(["--out", str(tmp_path), "--tiny", "--stages", "bf16"]) == 1
    assert on_a_card.main(["--out", str(tmp_path), "--tiny", "--stages", "link", "--seconds", "0"]) == 1
    lines = [json.loads(line) for line in (tmp_path / on_a_card.FOUND).read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["bf16", "link"]
    assert "was not written" in lines[0]["left_out"]
    assert lines[1]["left_out"] == "no time was left"

"""``layerstream reuse check``."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from layerstream.cli import app
from typer.testing import CliRunner

DEMO = resources.files("layerstream") / "demo"
DOCUMENTS = str(DEMO / "documents")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    asked = json.loads((DEMO / "questions.json").read_text())[:5]
    path = tmp_path / "questions.txt"
    path.write_text("\n".join(f"{one['question']}\t{one['answer']}" for one in asked) + "\n\nWho leads nothing?\n")
    return path


def test_both_ways_are_shown(questions: Path) -> None:
    options = ["--docs", DOCUMENTS, "--questions", str(questions), "--passages", "2", "--chunk-tokens", "32"]
    result = CliRunner().invoke(app, ["reuse", "check", *options], terminal_width=120)
    assert result.exit_code == 0, result.output
    assert "computed in full" in result.output
    assert "passages moved" in result.output
    assert "6 of 6" in result.output, "full is what full is"
    assert "of 5" in result.output, "five answers are known"
    assert "of 6 of 6 prompts passages were moved" in result.output


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_questions_are_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "none.txt"
    path.write_text(text)
    result = CliRunner().invoke(app, ["reuse", "check", "--docs", DOCUMENTS, "--questions", str(path)])
    assert result.exit_code != 0
    assert "no questions" in result.output


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    result = CliRunner().invoke(app, ["reuse", "check", "--docs", DOCUMENTS, "--questions", str(missing)])
    assert result.exit_code != 0
    assert "cannot be read" in result.output

"""``layerstream compare`` as a user meets it: a table, a sentence, an exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layerstream.cli import app
from layerstream.cli.compare import verdict
from layerstream.comparing import comparison
from layerstream.comparing.comparison import Comparison
from layerstream.comparing.judging import Choice, Culprit, Finding
from typer.testing import CliRunner, Result

RIGHT = Finding("model.layers.0", excess=0.1, apart=1e-6, position=4, drift=1e-6)
WRONG = Finding("model.layers.1", excess=40.0, apart=0.3, position=12, drift=0.3)
SAME = Choice(13, 7, 7, 0.0, 0.0)
OTHER = Choice(14, 7, 8, 2.5, 0.1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def found(
    *findings: Finding, choices: tuple[Choice, ...] = (SAME,), culprit: Culprit | None = None, dtype: str = "float32"
) -> Comparison:
    return Comparison("m", dtype, 13, findings, choices, culprit, {7: " cat", 8: " dog"})


def test_a_report_without_a_folder_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    result = run("demo", "--json", tmp_path / "missing" / "found.json")
    assert result.exit_code == 2
    assert "there is no folder" in " ".join(result.stderr.split())


def test_the_bundled_reader_is_plain_transformers(tmp_path: Path) -> None:
    result = run("demo", "--dtype", "float32", "--tokens", 3, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[0].startswith("demo in float32: ")
    assert [line.split()[0] for line in lines[3:-2]] == [
        "model.embed_tokens",
        *(f"model.layers.{layer}" for layer in range(4)),
        "model.norm",
        "logits",
    ]
    assert lines[-1].startswith("same: ")
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["outcome"] == "same"
    assert [token["agrees"] for token in written["tokens"]] == [True] * 3
    assert len(written["modules"]) == 7


def test_a_fault_is_named_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assemble = comparison.assemble

    def spoil(*args: Any) -> Any:
        parts = assemble(*args)
        parts.skeleton.model.model.layers[2].self_attn.scaling = float("nan")
        return parts

    monkeypatch.setattr(comparison, "assemble", spoil)
    result = run("demo", "--raw", "--prompt", "the end", "--tokens", 1, "--json", tmp_path / "found.json")
    assert result.exit_code == 1, result.output
    assert "> 999%" in result.stdout
    assert "model.layers.2 is the first that differs; what model.layers.2.self_attn is given agrees" in result.stdout
    assert json.loads((tmp_path / "found.json").read_text())["culprit"]["path"] == "model.layers.2.self_attn"


def test_what_cannot_be_done_is_a_usage_error() -> None:
    assert run("demo", "--tokens", 0).exit_code == 2
    result = run("demo", "--tokens", 100_000)
    assert result.exit_code == 2
    assert "shorten one of them" in result.stderr
    result = run("demo", "--kv-store", "x")
    assert result.exit_code == 2
    assert "leave out --kv-store and --draft-model" in result.stderr


def test_verdicts() -> None:
    same = "same: all modules agree within what float32 rounds, and the answer's tokens are plain transformers'"
    assert verdict(found(RIGHT)) == same
    tied = Choice(14, 7, 8, 1e-5, 1e-6)
    assert verdict(found(RIGHT, choices=(SAME, tied))) == (
        "same but for a tie: at token 14 the engine has ' cat' and plain transformers ' dog', whose logit is 1e-05 "
        "higher (0.00% of the largest); rounding decides between two that are as good as equal"
    )
    adds_up = verdict(found(RIGHT, choices=(OTHER,), dtype="bfloat16"))
    assert adds_up.startswith("different, and no module is to blame: at token 14")
    assert adds_up.endswith("what bfloat16 rounds adds up: --dtype float32 shows whether it is that alone")
    between = Culprit("model.layers.1.attn", between=("model.layers.1.attn.v", "model.layers.1.attn.o"))
    assert verdict(found(RIGHT, WRONG, culprit=between)) == (
        "different: model.layers.1 is the first that differs; what model.layers.1.attn is given agrees, and what it "
        "gives does not: its v still agrees and its o is given something else, so it is what it computes between the "
        "two; the answer's tokens are the same nevertheless"
    )
    expert = Culprit("model.layers.1.mlp.experts", experts=(3,))
    assert "model.layers.1.mlp.experts (expert 3) is given agrees" in verdict(found(WRONG, culprit=expert))
    again = verdict(found(WRONG, choices=(OTHER,)))
    assert "is not the same each time; at token 14 the engine has ' cat'" in again

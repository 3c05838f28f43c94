"""The crossover is measured once, remembered, and never trusted blindly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layerstream.checkpoint.codecs.base import Planes
from layerstream.checkpoint.codecs.bnb import BnbInt8
from layerstream.hardware.remembered import machine_name
from layerstream.model import kernels


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "cache" / "kernels.json"))
    monkeypatch.setattr(kernels, "SIZE", 256)
    return tmp_path / "cache" / "kernels.json"


def test_measured_once_and_then_remembered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(kernel: str) -> int:
        asked.append(kernel)
        return {"int4": 64, "int8": 0}[kernel]

    monkeypatch.setattr(kernels, "measure", measure)
    assert kernels.fused_rows({"int4", "int8"}) == {"int4": 64}
    assert kernels.fused_rows(["int4"]) == {"int4": 64}
    assert sorted(asked) == ["int4", "int8"]
    ((machine, found),) = json.loads(file.read_text()).items()
    assert "threads" in machine
    assert found == {"int4": 64, "int8": 0}


def test_nothing_is_measured_for_nothing(file: Path) -> None:
    assert kernels.fused_rows([]) == {}
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"int4": "x"}}'])
def test_a_damaged_file_is_written_anew(text: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure", lambda _: 8)
    file.parent.mkdir()
    file.write_text(text)
    assert kernels.fused_rows(["int8"]) == {"int8": 8}
    assert machine_name() in json.loads(file.read_text())


def test_without_a_folder_every_process_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "file" / "kernels.json"))
    monkeypatch.setattr(kernels, "measure", lambda _: 8)
    assert kernels.fused_rows(["int8"]) == {"int8": 8}


def test_the_kernels_that_are_used_agree_with_decoding(file: Path) -> None:
    for name in ("int4", "int8"):
        assert kernels.measure(name) in {0, *kernels.ROWS}


def test_a_wrong_kernel_is_not_used(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: BnbInt8, planes: Planes, inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
        return inputs.new_zeros((len(inputs), len(planes["weight"])))

    monkeypatch.setattr(BnbInt8, "product", wrong)
    assert kernels.measure("int8") == 0


def test_a_missing_kernel_is_not_used(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(BnbInt8, "product", missing)
    assert kernels.measure("int8") == 0

"""How many decode rows a block has on a card: by what products take there, the same in every process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layerstream.hardware.accelerators import ACCELERATORS
from layerstream.planner.facts import DEVICE_ROWS, STREAMING_ROWS
from layerstream.setup import device_rows as measured
from layerstream.setup.device_rows import VARIABLE, device_rows

from tests.pretend import PretendCuda, Pretended

CUDA = torch.device("cuda", 0)


class Card(Pretended):
    can_measure = True

    def __init__(self, many: float) -> None:
        super().__init__([PretendCuda()])
        self.asked: list[int] = []
        self._many = many

    def product_seconds(self, device: torch.device, num_rows: int) -> float:
        self.asked.append(num_rows)
        return self._many if num_rows == DEVICE_ROWS else 1.0


@pytest.mark.parametrize(("many", "expected"), [(1.1, DEVICE_ROWS), (2.5, STREAMING_ROWS)])
def test_a_small_card_gets_smaller_blocks(
    many: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "rows.json"))
    monkeypatch.setitem(ACCELERATORS, "cuda", card := Card(many))
    assert [device_rows(CUDA), device_rows(CUDA)] == [expected] * 2
    assert card.asked == [STREAMING_ROWS, DEVICE_ROWS], "it is measured once"
    (tmp_path / "rows.json").write_text('{"x": ')
    assert device_rows(CUDA) == expected


def test_what_is_remembered_of_others_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"another": 32}')
    monkeypatch.setenv(VARIABLE, str(file))
    monkeypatch.setitem(ACCELERATORS, "cuda", Card(1.0))
    device_rows(CUDA)
    assert json.loads(file.read_text())["another"] == 32


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "rows.json"))
    monkeypatch.setitem(ACCELERATORS, "cuda", Card(9.0))
    assert device_rows(CUDA) == STREAMING_ROWS


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "is_there", lambda device: False)
    monkeypatch.setitem(ACCELERATORS, "cuda", Card(9.0))
    assert device_rows(CUDA) == device_rows(torch.device("cpu")) == DEVICE_ROWS

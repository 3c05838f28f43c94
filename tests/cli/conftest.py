"""What the command line's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream.measuring import rates as probe


@pytest.fixture(autouse=True)
def _measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TIMES", 1)


@pytest.fixture
def model(folder: Path) -> Path:
    """A small Llama's folder, not to be written to."""
    return folder

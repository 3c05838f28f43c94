"""What the command line's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream.measuring import rates as probe


@pytest.fixture(autouse=True)
def _measure_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is measured once, on small matrices and for moments: what it comes to is no test's business."""
    monkeypatch.setattr(probe, "TIMES", 1)
    monkeypatch.setattr(probe, "SIZE", 512)
    monkeypatch.setattr(probe, "NUM_MATRICES", 2)
    monkeypatch.setattr(probe, "DISK_SECONDS", 0.1)
    monkeypatch.setattr(probe, "OVERLAP_SECONDS", 0.1)


@pytest.fixture
def model(folder: Path) -> Path:
    """A small Llama's folder, not to be written to."""
    return folder

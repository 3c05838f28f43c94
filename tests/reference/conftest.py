"""All tests here run on models small enough to be cut and streamed in a moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from layerstream import assembly, sizing
from layerstream.planner import facts as assumed
from layerstream.planner import on_device

from tests.harness import shrink_units
from tests.pretend import PretendCuda


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """See :func:`tests.harness.shrink_units`."""
    shrink_units(monkeypatch)


@pytest.fixture(autouse=True)
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """Engines with ``device="cuda"`` compute on a pretended one; small models stream to it as if they were large."""
    device = PretendCuda(pause=0.0005)
    monkeypatch.setattr(assembly, "open_device", lambda wanted: device if wanted.type == "cuda" else None)
    monkeypatch.setattr(sizing, "DEVICE_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(on_device, "HOST_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(assumed, "DEVICE_PROMPT_ROWS", 64)
    monkeypatch.setattr(assumed, "DEVICE_SWEEP_TOKENS", 96)
    yield device
    device.close()

"""Budgets of tests on devices hold with the constants of a real one, which the pretended one leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream.planner import on_device
from layerstream.setup import plan_model as sizing

from tests.harness import device_config, shrink_units
from tests.models import make_model
from tests.pretend import pretend_cuda


@pytest.mark.parametrize("mode", ["resident", "host", "disk", "cut"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_host_memory_has_room_for_its_workspace(
    family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(family, tmp_path)
    shrink_units(monkeypatch)
    real = on_device.HOST_WORKSPACE_BYTES, sizing.DEVICE_WORKSPACE_BYTES
    with pretend_cuda(monkeypatch):
        monkeypatch.setattr(on_device, "HOST_WORKSPACE_BYTES", real[0])
        monkeypatch.setattr(sizing, "DEVICE_WORKSPACE_BYTES", real[1])
        plan = sizing.plan_model(device_config(tmp_path, mode))[0]
    assert plan.streams == (mode != "resident")
    assert (plan.disk_bytes > 0) == (mode in {"disk", "cut"})

"""``dtype=``: half precision gives nearly what single precision does, resident and streaming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layerstream.errors import ConfigurationError
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import plan_model

from tests.harness import config_for, draw_prompt, run_greedily
from tests.models import make_model


@pytest.mark.parametrize("mode", ["resident", "layers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_single_precision(dtype: str, mode: str, folder: Path) -> None:
    prompts = [draw_prompt(length) for length in (70, 5)]
    exact = run_greedily(config_for(folder, "resident"), prompts)
    half = run_greedily(config_for(folder, mode, dtype), prompts)
    assert half.streams == (mode == "layers")
    for own, other in zip(half.logits, exact.logits, strict=True):
        assert own.dtype == getattr(torch, dtype)
        assert (own[0].float() - other[0]).abs().max() <= 0.15 * other[0].abs().max()


def test_auto_is_what_the_checkpoint_was_saved_in(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        make_model("llama", tmp_path / str(dtype)).to(dtype).save_pretrained(tmp_path / str(dtype))
        assert plan_model(EngineConfig(str(tmp_path / str(dtype))))[1].dtype == dtype


def test_other_names_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="dtype is 'int8'; expected 'auto', 'float32', 'bfloat16', 'float16'"):
        plan_model(EngineConfig(str(folder), dtype="int8"))

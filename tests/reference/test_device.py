"""On a pretended device, wherever the weights are: every operation has its tensors in one place, every copy is late, and
tokens and logits are those of plain transformers. (All families and formats run on it in the tests of those.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream.sizing import plan_model

from tests.harness import STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import make_model
from tests.pretend import PretendCuda

PROMPT_LENGTHS = (150, 5, 67)
TOLERANCE = 1e-4


@pytest.mark.parametrize("mode", ["device-resident", "device-host", "device-disk", "device-cut"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "qwen3-moe", "gpt-oss", "deepseek-v3"])
def test_wherever_the_weights_are(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path, pretended_cuda: PretendCuda
) -> None:
    if mode == "device-cut" and family == "deepseek-v3":
        pytest.skip("attention must fit the ring as a whole where only one sequence is in a row block")
    reference = make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    config = config_for(tmp_path, mode)
    plan = plan_model(config)[0]
    assert plan.streams == (mode in STREAMING)
    assert (plan.disk_bytes > 0) == (mode in {"device-disk", "device-cut"})
    run = run_greedily(config, prompts)
    assert_equals(run, reference, prompts, TOLERANCE)
    assert pretended_cuda.peak_bytes() <= config.memory_bytes
    assert not pretended_cuda.pinned, "host memory was left pinned"
    assert pretended_cuda.ceiling == config.memory_bytes

"""Every tested family against plain transformers: greedy tokens and logits, fp32, on every step.

Three prompts of different lengths run in the same sweeps; the longest is computed in several chunks over several
sweeps, and is longer than every window and attention chunk among the families.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from layerstream.model.families import TESTED

from tests.harness import STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import FAMILIES, make_model

PROMPT_LENGTHS = (150, 5, 67)
TOLERANCE = 1e-4  # of the largest logit


@pytest.mark.parametrize("mode", ["resident", "layers", "cut", "device-host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_transformers(family: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    if mode == "cut" and family in {"llama4-text", "deepseek-v3"}:
        pytest.skip("attention must fit the ring as a whole where only one sequence is in a row block")
    reference = make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    run = run_greedily(config_for(tmp_path, mode), prompts)
    assert run.streams == (mode in STREAMING)
    assert_equals(run, reference, prompts, TOLERANCE)


def test_every_tested_family_is_compared() -> None:
    compared = {getattr(transformers, f"{prefix}Config").model_type for prefix, _ in FAMILIES.values()}
    assert compared == TESTED

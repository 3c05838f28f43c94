"""Every tested family against plain transformers: greedy tokens and logits, fp32, on every step.

Three prompts of different lengths run in the same sweeps; the longest is computed in several chunks over several
sweeps, and is longer than every window and attention chunk among the families. Then another engine answers them with
what the first one stored, and with guesses: the same bits.

``make test`` runs each family in one mode; ``make families`` in all of them, and with quantised Linears.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream import KVStoreConfig
from layerstream.model.families import TESTED
from layerstream.model.skeleton import build_skeleton

from tests.guesser import Guesser
from tests.harness import STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import FAMILIES, make_model
from tests.quantised import PACKERS, write_quantised

PROMPT_LENGTHS = (150, 5, 67)
TOLERANCE = 1e-4  # of the largest logit
MODES = ("resident", "layers", "cut", "device-host")

CUDA_ONLY = {"kolibri1"}  # transformers calls an operator there that a pretended device does not have


def modes_of(family: str) -> tuple[str, ...]:
    """Those that *family* is compared in."""
    return MODES[:-1] if family in CUDA_ONLY else MODES


def mode_of(family: str) -> str:
    """The one that ``make test`` runs *family* in: on a pretended device, four times as slow as the others, one in
    seven."""
    turns = (*2 * MODES[:-1], *modes_of(family)[len(MODES) - 1 :])
    return turns[zlib.crc32(family.encode()) % len(turns)]


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(family, mode, marks=() if mode == mode_of(family) else pytest.mark.families)
        for family in FAMILIES
        for mode in modes_of(family)
    ],
)
def test_equals_plain_transformers(family: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    model = tmp_path / "model"
    reference = make_model(family, model)
    add_tokenizer(model, tokenizer_folder)
    if mode == "cut" and build_skeleton(model).trace.is_alone:
        mode = "layers"  # rows of one sequence at a time: attention has to fit the ring as a whole
    store = KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)
    config = replace(config_for(model, mode), kv_store=store)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    cold = run_greedily(config, prompts)
    assert cold.streams == (mode in STREAMING)
    assert_equals(cold, reference, prompts, TOLERANCE)
    guesser = Guesser(cold.tokens, seed=0)
    warm = run_greedily(config, prompts, guesser)
    assert guesser.num_guessed
    page = warm.page_tokens
    assert warm.loaded_tokens == sum((length - 1) // page * page for length in PROMPT_LENGTHS)
    for before, after in zip(cold.logits, warm.logits, strict=True):
        assert torch.equal(before, after)


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_decoded_weights(family: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    reference = make_model(family, tmp_path)
    pack, quantisation = PACKERS["compressed-fp8"]
    write_quantised(tmp_path, reference, pack, quantisation, leave="nothing")
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    mode = "resident" if family == "biogpt" else "layers"  # its table of positions takes more than streaming saves
    assert_equals(run_greedily(config_for(tmp_path, mode), prompts), reference, prompts, TOLERANCE)


def test_every_tested_family_is_compared() -> None:
    assert {small.model_type for small in FAMILIES.values()} == TESTED
    assert len(TESTED) >= 90


def test_every_mode_has_families() -> None:
    assert {mode_of(family) for family in FAMILIES} == set(MODES)

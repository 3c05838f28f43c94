"""Recurrent layers on a pretended device: all decode rows of a block step at once, each as it would alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream.core.sweep import Sweep
from layerstream.model import recurrence
from layerstream.setup.assembly import assemble
from layerstream.setup.stepping import step_greedily
from torch.utils._python_dispatch import TorchDispatchMode

from tests.guesser import Guesser
from tests.harness import add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import make_model
from tests.pretend import PretendCuda

FAMILIES = [  # a kind of scan each
    "qwen3_5_text",
    "falcon_h1",
    "mamba",
    pytest.param("kimi_linear", marks=pytest.mark.families),
    pytest.param("lfm2", marks=pytest.mark.families),
]
SIZES = {"mamba": {"num_hidden_layers": 2}}
PROMPT_LENGTHS = (70, 5, 33)
MOST_LAUNCHES = 48  # of both scans of a layer, gathering and scattering included


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_among_others_and_with_guesses(
    family: str, tmp_path: Path, tokenizer_folder: Path, pretended_cuda: PretendCuda
) -> None:
    reference = make_model(family, tmp_path, sizes=SIZES.get(family))
    add_tokenizer(tmp_path, tokenizer_folder)
    config = config_for(tmp_path, "device-resident")
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    run = run_greedily(config, prompts)
    assert_equals(run, reference, prompts, 1e-4)
    assert config.memory_bytes is not None
    assert pretended_cuda.most_bytes <= config.memory_bytes
    alone = run_greedily(config, prompts[1:2])
    assert torch.equal(alone.logits[0], run.logits[1])
    guesser = Guesser(run.tokens, seed=0)
    guessed = run_greedily(config, prompts, guesser)
    assert guesser.num_guessed
    assert all(torch.equal(own, plain) for own, plain in zip(guessed.logits, run.logits, strict=True))


def test_rows_at_once_may_be_fewer_than_a_block(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large states; guesses go on from guesses of another step."""
    reference = make_model("qwen3_5_text", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    monkeypatch.setattr("layerstream.kv.shape.BATCH_BYTES", 10_000)
    config = config_for(tmp_path, "device-resident")
    prompts = [draw_prompt(length) for length in (20, 5, 33, 9, 11)]
    run = run_greedily(config, prompts)
    assert_equals(run, reference, prompts, 1e-4)
    guessed = run_greedily(config, prompts, Guesser(run.tokens, seed=1))
    assert all(torch.equal(own, plain) for own, plain in zip(guessed.logits, run.logits, strict=True))


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "mamba", "lfm2"])  # which share blocks
def test_launches_do_not_depend_on_the_number_of_sequences(
    family: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(family, tmp_path, sizes=SIZES.get(family))
    add_tokenizer(tmp_path, tokenizer_folder)
    sweeps: list[tuple[Sweep, Counter[int]]] = []  # each with the launches of recurrent layers
    mix = recurrence.Recurrence.mix

    def counting(self: recurrence.Recurrence, layer: int, call: Any) -> Any:
        with _Launches() as launches:
            found = mix(self, layer, call)
        sweeps[-1][1][layer] += launches.count
        return found

    monkeypatch.setattr(recurrence.Recurrence, "mix", counting)
    parts = assemble(config_for(tmp_path, "device-resident"), None)
    try:
        prompts = [draw_prompt(5, seed) for seed in range(8)]
        step_greedily(parts, prompts, 3, watch=lambda sweep: sweeps.append((sweep, Counter())))
        step_greedily(parts, prompts[:1], 3, watch=lambda sweep: sweeps.append((sweep, Counter())))
    finally:
        parts.close()
    found = {sweep.num_tokens: launches for sweep, launches in sweeps if not sweep.num_prompt_rows}
    assert 1 in found
    assert max(found) >= 4
    assert all(launches == found[1] for launches in found.values())
    first, *others = found[1].values()
    assert set(others) <= {first, first - 1, first - 2}, "the numbers of slots cross to the first layer alone"
    assert first <= MOST_LAUNCHES


class _Launches(TorchDispatchMode):
    """Counts operators that are no views, inside of pretended tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))

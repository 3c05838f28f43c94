"""The self-check: what it compares, what it finds, and that nothing wrong passes it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from layerstream import LayerStream, SamplingParams
from layerstream.errors import UnsupportedModel
from layerstream.kv.shape import PageShape
from layerstream.model import trace as tracing
from layerstream.model.traced import LayerTrace, Trace
from layerstream.setup import self_check
from layerstream.setup.config import EngineConfig
from layerstream.setup.self_check import Comparison, SelfCheck, check_family, check_untested

from benchmarks.published import full_config
from tests.harness import add_tokenizer
from tests.models.hybrids import HYBRIDS

ON_THE_HOST = EngineConfig("", device="cpu")
SHAPE = PageShape(2, 16, 2, 16, "float32")
ALL = LayerTrace("layers.0.self_attn", SHAPE, 0)
WINDOW, CHUNK = replace(ALL, window=24), replace(ALL, chunk=24)
RIGHT = Comparison("streamed", 1e-6, is_greedy=True, is_repeated=True, row_blocks=2, loaded_tokens=0)


def save(family: str, folder: Path, tokenizer_folder: Path, **changes: Any) -> str:
    small = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(family, **{**small, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    add_tokenizer(folder, tokenizer_folder)
    return str(folder)


def traced(*layers: LayerTrace) -> Trace:
    return Trace(layers, {}, frozenset(), frozenset(), {})


def test_an_untested_family_that_agrees_runs(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = save("gpt2", tmp_path, tokenizer_folder, num_attention_heads=4)
    with pytest.raises(UnsupportedModel, match="allow_untested=True"):
        LayerStream(folder)
    with LayerStream(folder, allow_untested=True) as engine:
        assert len(engine.generate("the fox", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_full_model_is_compared_in_all_that_it_does() -> None:
    found = check_family(full_config("gemma3n_text"), ON_THE_HOST)
    assert found.agrees
    assert set(found.layers) == {
        "sees a window of 24",
        "sees all positions",
        "sees a window of 24, reads what another layer cached",
        "sees all positions, reads what another layer cached",
    }
    assert [run.mode for run in found.runs] == [
        "streamed",
        "streamed, from the store",
        "resident",
        "resident, from the store",
    ]
    assert all(run.row_blocks >= 2 for run in found.runs[::2])
    assert [run.loaded_tokens > 0 for run in found.runs] == [False, True, False, True]


@pytest.mark.parametrize("name", ["lfm3", "mamba2", "qwen3_5_text"])
def test_states_are_compared_as_all_else_is(name: str) -> None:
    """Of prompts that run at once, whose snapshots are stored and loaded."""
    found = check_family(HYBRIDS[name].config(), ON_THE_HOST)
    assert found.agrees, [run.found for run in found.runs]
    assert any("keeps the state" in kind for kind in found.layers)
    assert all(run.row_blocks >= 2 for run in found.runs[::2])
    assert all(run.loaded_tokens >= 128 for run in found.runs[1::2])


def test_windows_that_nobody_applies_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "locality", lambda *_: (None, None))
    found = check_family(full_config("cohere2"), ON_THE_HOST)
    assert not found.agrees
    assert all(run.difference > 0.01 for run in found.runs)


def test_a_family_that_gives_other_answers_is_refused(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("gpt2", tmp_path, tokenizer_folder, num_attention_heads=4)
    wrong = replace(RIGHT, mode="resident", difference=0.3, is_greedy=False)
    found = SelfCheck("gpt2", False, ("sees all positions",), (RIGHT, wrong))
    monkeypatch.setattr(self_check, "self_check", lambda *_: found)
    with pytest.raises(UnsupportedModel, match=r"'gpt2'.*resident: .* differ by 3e-01, other tokens"):
        check_untested(EngineConfig(folder, allow_untested=True))


@pytest.mark.parametrize(
    ("family", "changes", "mechanism"),
    [
        ("recurrent_gemma", {"block_types": ["recurrent", "attention"]}, "recurrent state"),
        ("bloom", {"n_head": 4}, "bypasses"),
        ("deepseek_v32", {}, "sparse attention"),
    ],
)
def test_a_family_that_cannot_run_says_what_it_does(family: str, changes: dict[str, Any], mechanism: str) -> None:
    with pytest.raises(UnsupportedModel, match=mechanism) as error:
        check_family(transformers.AutoConfig.for_model(family, num_hidden_layers=2, **changes), ON_THE_HOST)
    assert repr(family) in str(error.value)


def test_a_config_that_cannot_be_shrunk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def shrink(_: Any) -> Any:
        raise ValueError("heads do not fit")

    monkeypatch.setattr(self_check, "shrink", shrink)
    with pytest.raises(UnsupportedModel, match="self-check of 'llama' did not run: ValueError: heads do not fit"):
        check_family(full_config("llama"), ON_THE_HOST)


def test_a_copy_without_a_kind_of_layer_proves_nothing() -> None:
    with pytest.raises(UnsupportedModel, match=r"leave out a kind of layer .sees a window"):
        self_check._compared_layers("new", traced(ALL, replace(WINDOW, window=4096)), traced(ALL, ALL))
    with pytest.raises(UnsupportedModel, match="reads what another layer cached"):
        self_check._compared_layers("new", traced(ALL, replace(ALL, kept=None)), traced(ALL, ALL))
    assert self_check._compared_layers("new", traced(ALL, replace(CHUNK, chunk=8192)), traced(CHUNK, ALL, CHUNK)) == (
        "sees a chunk of 24",
        "sees all positions",
    )


def test_a_window_longer_than_the_prompts_proves_nothing() -> None:
    with pytest.raises(UnsupportedModel, match=r"does not reach the end of what a layer sees .150 positions"):
        self_check._compared_layers("new", traced(WINDOW), traced(replace(WINDOW, window=150)))


def test_what_agrees() -> None:
    assert RIGHT.agrees
    assert not replace(RIGHT, difference=0.01).agrees
    assert not replace(RIGHT, difference=math.nan).agrees
    assert not replace(RIGHT, is_greedy=False).agrees
    unlike = replace(RIGHT, is_repeated=False)
    assert not unlike.agrees
    assert "nothing came from the store" in unlike.found
    assert "other bits than before" in replace(unlike, loaded_tokens=32).found
    assert math.isnan(SelfCheck("new", False, (), (RIGHT, replace(RIGHT, difference=math.nan))).difference)

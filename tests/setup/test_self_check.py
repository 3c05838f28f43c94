"""``allow_untested``: a family is tried small before it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from layerstream import LayerStream, SamplingParams
from layerstream.errors import UnsupportedModel
from layerstream.setup.config import EngineConfig
from layerstream.setup.self_check import check_untested

from tests.harness import add_tokenizer

_SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def save(family: str, folder: Path, tokenizer_folder: Path, **changes: Any) -> str:
    config = transformers.AutoConfig.for_model(family, **{**_SMALL, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    add_tokenizer(folder, tokenizer_folder)
    return str(folder)


def test_an_untested_family_that_agrees_runs(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = save("persimmon", tmp_path, tokenizer_folder, num_attention_heads=4)
    with pytest.raises(UnsupportedModel, match="allow_untested=True"):
        LayerStream(folder)
    with LayerStream(folder, allow_untested=True) as engine:
        assert len(engine.generate("the fox", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_family_that_gives_other_logits_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = save("diffllama", tmp_path, tokenizer_folder, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UnsupportedModel, match="other logits than plain transformers"):
        LayerStream(folder, allow_untested=True)


def test_a_family_that_does_not_run_says_what_happened(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = save("xglm", tmp_path, tokenizer_folder, d_model=64, attention_heads=4, num_layers=2, ffn_dim=96)
    with pytest.raises(UnsupportedModel, match="self-check did not run: AttributeError"):
        LayerStream(folder, allow_untested=True)


def test_recurrent_state_is_refused_all_the_same(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = transformers.AutoConfig.for_model("lfm2", **_SMALL, layer_types=["conv", "full_attention"])
    config.save_pretrained(tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    with pytest.raises(UnsupportedModel, match="recurrent state"):
        check_untested(EngineConfig(str(tmp_path), allow_untested=True))

"""Sampling defaults and EOS as the model's files name them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from layerstream.api.params import SamplingParams
from layerstream.errors import InvalidHeader
from layerstream.text.defaults import LEAST_TOP_P, GenerationDefaults, load_defaults

NEUTRAL: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def load(
    folder: Path, said: Any = None, *, config_eos: Any = None, tokenizer_eos: int | None = None
) -> GenerationDefaults:
    if said is not None:
        (folder / "generation_config.json").write_text(said if isinstance(said, str) else json.dumps(said))
    return load_defaults(folder, SimpleNamespace(eos_token_id=config_eos), SimpleNamespace(eos_token_id=tokenizer_eos))


def test_without_a_file_greedy(tmp_path: Path) -> None:
    defaults = load(tmp_path)
    assert defaults.sampling == SamplingParams(**NEUTRAL)
    assert defaults.describe() == "greedy by default"


def test_what_the_file_says(tmp_path: Path) -> None:
    defaults = load(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.40.0"})
    assert defaults.sampling == SamplingParams(**{**NEUTRAL, "temperature": 0.6, "top_p": 0.9})
    assert defaults.describe() == "temperature 0.6, top_p 0.9 from generation_config.json"


def test_every_field(tmp_path: Path) -> None:
    said = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
    defaults = load(tmp_path, {"do_sample": True, **said})
    assert defaults.sampling == SamplingParams(**said)
    assert defaults.describe() == (
        "temperature 0.7, top_p 0.8, top_k 20, min_p 0.05, repetition_penalty 1.05 from generation_config.json"
    )


def test_sampling_without_a_temperature_is_at_one(tmp_path: Path) -> None:
    defaults = load(tmp_path, {"do_sample": True, "top_p": 0.9, "top_k": None})
    assert defaults.sampling == SamplingParams(**{**NEUTRAL, "temperature": 1.0, "top_p": 0.9})
    assert defaults.describe() == "temperature 1, top_p 0.9 from generation_config.json"


@pytest.mark.parametrize("do_sample", [{}, {"do_sample": False}, {"do_sample": None}])
def test_without_do_sample_greedy_even_with_a_temperature(tmp_path: Path, do_sample: dict[str, Any]) -> None:
    defaults = load(tmp_path, {**do_sample, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1})
    assert defaults.sampling == SamplingParams(**{**NEUTRAL, "repetition_penalty": 1.1})
    assert defaults.describe() == "greedy, repetition_penalty 1.1 from generation_config.json"


def test_a_file_that_transformers_wrote(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[5, 6]).save_pretrained(tmp_path)
    defaults = load(tmp_path)
    assert defaults.sampling == SamplingParams(**{**NEUTRAL, "temperature": 0.6})
    assert defaults.eos_token_ids == {5, 6}


@pytest.mark.parametrize(
    ("said", "config_eos", "tokenizer_eos", "expected"),
    [
        ({"eos_token_id": 7}, 8, None, {7}),
        ({"eos_token_id": [7, 9]}, 8, 9, {7, 9}),
        ({"eos_token_id": 7}, 8, 9, {7, 9}),
        ({"eos_token_id": 0}, 8, None, {0}),
        ({}, 8, None, {8}),
        ({}, [8, 10], 9, {8, 9, 10}),
        (None, None, 9, {9}),
        (None, None, None, set()),
    ],
)
def test_end_of_text(tmp_path: Path, said: Any, config_eos: Any, tokenizer_eos: Any, expected: set[int]) -> None:
    assert load(tmp_path, said, config_eos=config_eos, tokenizer_eos=tokenizer_eos).eos_token_ids == expected


def test_a_config_without_eos(tmp_path: Path) -> None:
    assert load_defaults(tmp_path, object(), SimpleNamespace(eos_token_id=3)).eos_token_ids == {3}


def test_max_tokens_and_seed_are_left_to_the_engine(tmp_path: Path) -> None:
    sampling = load(tmp_path, {"do_sample": True, "max_new_tokens": 2048, "max_length": 4096}).sampling
    assert sampling.max_tokens is None
    assert sampling.seed is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON list, expected an object"),
        ({"do_sample": True, "temperature": "warm"}, "temperature cannot be used"),
        ({"do_sample": True, "top_p": -1}, "top_p cannot be used"),
        ({"do_sample": True, "top_p": True}, "top_p cannot be used"),
        ({"do_sample": True, "min_p": 2}, "min_p cannot be used"),
        ({"do_sample": True, "top_k": -1}, "top_k cannot be used"),
        ('{"do_sample": true, "temperature": 1e400}', "temperature cannot be used"),
        ('{"do_sample": true, "temperature": 1%s}' % ("0" * 400), "401 digits"),
        ({"repetition_penalty": 0}, "repetition_penalty cannot be used"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, None]}, "eos_token_id is"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, said: Any, message: str) -> None:
    with pytest.raises(InvalidHeader, match=message) as caught:
        load(tmp_path, said)
    assert str(tmp_path / "generation_config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"top_p": 0}, {}),
        ({"top_p": 1.5}, {}),
        ({"temperature": "warm", "top_k": -1, "min_p": 7}, {}),
        ({"do_sample": True, "top_p": 1.5}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "top_p": 7}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "top_p": 0}, {"temperature": 1.0, "top_p": LEAST_TOP_P}),
    ],
)
def test_what_transformers_lives_with_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: Any, expected: dict[str, Any]
) -> None:
    assert load(tmp_path, said).sampling == SamplingParams(**{**NEUTRAL, **expected})
    assert "generation_config.json" in caplog.text


@pytest.mark.parametrize(
    ("said", "expected"),
    [(2.0, {2}), ([2.0, 3], {2, 3}), (2.5, set()), (-1, set()), ([2, -1], {2}), (99, set()), (True, set())],
)
def test_odd_ends_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: Any, expected: set[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    config, tokenizer = SimpleNamespace(eos_token_id=None, vocab_size=64), SimpleNamespace(eos_token_id=None)
    assert load_defaults(tmp_path, config, tokenizer).eos_token_ids == expected
    assert "eos_token_id" in caplog.text

"""What users of other libraries write: every hint names something that is there."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from layerstream import ConfigurationError, LayerStream
from layerstream.api.habits import HINTS, hint_for
from layerstream.api.params import SAMPLING_NAMES
from layerstream.handle import ENGINE_OPTIONS, check_call, check_fields

OPTIONS = set(inspect.signature(LayerStream).parameters) - {"model"}
FIELDS = {"model", "engine_kwargs", "max_tokens", "max_new_tokens", *SAMPLING_NAMES}


def test_the_options_of_the_engine_are_known() -> None:
    assert ENGINE_OPTIONS == OPTIONS


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_names_options_that_there_are(name: str) -> None:
    hint = hint_for(name, 4096, {"temperature", "max_tokens"})
    assert hint is not None
    assert set(re.findall(r"'(\w+)':", hint)) - {"type"} <= OPTIONS
    assert set(re.findall(r"(\w+)=", hint)) <= FIELDS
    assert "max_new_tokens" not in hint


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("n_ctx", 8192, "engine_kwargs={'max_context': 8192}"),
        ("num_ctx", 8192, "engine_kwargs={'max_context': 8192}"),
        ("load_in_4bit", True, "engine_kwargs={'quantization': 'nf4'}"),
        ("torch_dtype", "bfloat16", "engine_kwargs={'dtype': 'bfloat16'}"),
        ("device_map", "auto", "engine_kwargs={'device': 'cuda'}"),
        ("n_gpu_layers", -1, "stays there by itself"),
        ("generate_kwargs", {"temperature": 0}, "sampling options are fields of their own"),
        ("model_kwargs", {}, "engine_kwargs"),
        ("max_new_tokens", 64, "max_tokens=64"),
        ("num_predict", 64, "max_tokens=64"),
        ("repeat_penalty", 1.1, "repetition_penalty=1.1"),
        ("model_path", "a.gguf", "model='a.gguf'"),
        ("memory", "3GiB", "engine_kwargs={'memory': '3GiB'}"),
        ("temprature", 1, "did you mean 'temperature'"),
    ],
)
def test_a_field_and_an_option_of_a_call_say_what_it_is_here(name: str, value: Any, says: str) -> None:
    known = {"model", "temperature", "max_tokens"}
    for check in (
        lambda: check_fields("Wrapper", {name: value}, known),
        lambda: check_call("Wrapper", "demo", {name: value}, known),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(says)):
            check()


def test_the_longest_answer_has_two_names() -> None:
    with pytest.raises(ConfigurationError, match="max_new_tokens=64"):
        check_fields("Wrapper", {"max_tokens": 64}, {"max_new_tokens"})

"""Sizes and sampling parameters: what is accepted, and what the refusals say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.sizes import format_size, parse_size
from layerstream.errors import InvalidSamplingParams, InvalidSize


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("3GiB", 3 * 2**30), ("512m", 512 * 2**20), ("1.5 GB", 1_500_000_000), ("7", 7), (9, 9), ("2KiB", 2048)],
)
def test_sizes_as_people_write_them(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("bad", ["3 parsecs", "", "-1", 0, -5, "0", True, 1.5, None])
def test_sizes_that_are_none(bad: object) -> None:
    with pytest.raises(InvalidSize):
        parse_size(bad)  # type: ignore[arg-type]


@given(st.integers(1, 2**45))
def test_an_exact_size_is_never_less(num_bytes: int) -> None:
    assert num_bytes <= parse_size(format_size(num_bytes, exact=True)) <= num_bytes * 1.001 + 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number >= 1"),
        ({"temperature": -0.1}, r"temperature is -0.1; expected a number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, r"top_p is 0; expected a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, r"min_p is 2; expected a number in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": -1}, "seed"),
        ({"n": 0}, "n is 0"),
        ({"n": None}, "n is None"),
        ({"logprobs": 101}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_out_of_range_fields_are_named_with_their_range(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidSamplingParams, match=words):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_defaults_fill_what_was_left_open() -> None:
    defaults = SamplingParams(temperature=0.6, top_k=20)
    filled = SamplingParams(top_k=0, stop="x").with_defaults(defaults)
    assert (filled.temperature, filled.top_k, filled.stop) == (0.6, 0, ("x",))

"""Answers keep to their response format, and what it forces takes no sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from layerstream import GrammarError, InvalidSamplingParams, LayerStream, SamplingParams
from layerstream.text.response_format import GrammarConstraint

from tests.harness import draw_prompt

KEYS = ("name", "city", "color", "animal", "year", "room")
SIX_KEYS = {
    "type": "json_schema",
    "schema": {
        "type": "object",
        "properties": {key: {"type": "string", "maxLength": 4} for key in KEYS},
        "required": list(KEYS),
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_of_six_keys_takes_half_as_many_sweeps_as_tokens(engine: LayerStream, temperature: float) -> None:
    params = SamplingParams(max_tokens=250, temperature=temperature, seed=4, response_format=SIX_KEYS)
    completion = engine.generate([draw_prompt(20)], params)[0]
    assert completion.finish_reason == "stop"
    assert list(json.loads(completion.text)) == list(KEYS)
    assert completion.metrics.sweeps <= len(completion.token_ids) / 2
    assert completion.metrics.forced_tokens >= len(completion.token_ids) / 2
    assert engine.stats().forced_tokens == completion.metrics.forced_tokens


@pytest.mark.parametrize(
    ("response_format", "pattern"),
    [
        ({"type": "regex", "regex": "[0-9]{4}-[a-f]{2}"}, "[0-9]{4}-[a-f]{2}"),
        ({"type": "choice", "choices": ["lazy dog", "quick fox"]}, "lazy dog|quick fox"),
        ({"type": "grammar", "grammar": 'start: "a" /b{1,3}/ "c"'}, "ab{1,3}c"),
        ({"type": "grammar", "grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"type": "json_schema", "schema": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
    ],
)
def test_formats_with_and_without_guesses(
    engine: LayerStream, folder: Path, response_format: dict, pattern: str
) -> None:
    with LayerStream(
        folder, memory=engine.plan.budget_bytes, dtype="float32", speculation="off", progress=False
    ) as plain:
        for temperature in (0.0, 1.2):
            params = SamplingParams(max_tokens=40, temperature=temperature, seed=9, response_format=response_format)
            completions = [e.generate([draw_prompt(30)], params)[0] for e in (engine, plain)]
            assert re.fullmatch(pattern, completions[0].text)
            assert completions[0].token_ids == completions[1].token_ids


def test_a_format_that_leaves_no_choice_takes_no_sweep(engine: LayerStream) -> None:
    params = SamplingParams(response_format={"type": "choice", "choices": ["the dog"]}, max_tokens=20)
    completion = engine.generate([draw_prompt(5)], params)[0]
    assert (completion.text, completion.metrics.sweeps, completion.finish_reason) == ("the dog", 0, "stop")


def test_logprobs_are_there_for_every_token(engine: LayerStream) -> None:
    params = SamplingParams(response_format=SIX_KEYS, max_tokens=30, temperature=0.0, logprobs=0)
    completion = engine.generate([draw_prompt(5)], params)[0]
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert completion.metrics.forced_tokens == 0


@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ({"type": "regex", "regex": "a("}, "unclosed group"),
        ({"type": "json_schema", "schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable"),
        ({"type": "json_schema", "schema": {"type": "colour"}}, "colour"),
        ({"type": "grammar", "grammar": "start: nothing"}, "nothing"),
    ],
)
def test_a_format_that_does_not_work_says_why(engine: LayerStream, response_format: dict, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        engine.generate([draw_prompt(5)], SamplingParams(response_format=response_format))
    assert engine.stats().sweeps == 0


@pytest.mark.parametrize("value", [{"type": "poem"}, {"type": "choice", "choices": []}, "json", {"type": "regex"}])
def test_a_format_of_no_known_form(value: object) -> None:
    with pytest.raises(InvalidSamplingParams, match="response_format"):
        SamplingParams(response_format=value)


def test_openai_form_and_pydantic() -> None:
    schema = {"type": "object"}
    nested = SamplingParams(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert nested.response_format == {"type": "json_schema", "schema": schema}

    class Model:
        @classmethod
        def model_json_schema(cls) -> dict:
            return schema

    assert SamplingParams(response_format=Model).response_format == nested.response_format


def test_an_error_in_a_grammar_fails_that_request_alone(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def mask(self: GrammarConstraint) -> np.ndarray:
        calls.append(self)
        if len(calls) > 3:
            raise GrammarError("stuck")
        return np.ones(engine.plan.facts.vocab_size, dtype=bool)

    other = engine.submit(draw_prompt(9), SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0))
    params = SamplingParams(max_tokens=12, response_format={"type": "regex", "regex": "[a-z ]{4,40}"})
    engine.generate([draw_prompt(5)], params)  # compiled
    monkeypatch.setattr(GrammarConstraint, "mask", mask)
    monkeypatch.setattr(GrammarConstraint, "accept", lambda self, token_id: None)
    with pytest.raises(GrammarError, match="stuck"):
        engine.generate([draw_prompt(5)], params)
    assert len(other.result().token_ids) == 12


def test_a_schema_that_json_cannot_say(engine: LayerStream) -> None:
    deep: dict = {}
    for _ in range(20_000):
        deep = {"items": deep}
    for schema in ({"enum": [{1, 2}]}, {"enum": [object()]}, {"properties": {(1, 2): {}}}, {1: 2, "a": 3}, deep):
        with pytest.raises(GrammarError, match="response_format"):
            engine.submit([5, 6], {"response_format": {"type": "json_schema", "schema": schema}})

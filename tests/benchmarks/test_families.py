"""The survey of model types: what it counts as bad, and a type of each end."""

from __future__ import annotations

from benchmarks.families import Outcome, Surveyed, model_types, survey

RIGHT, REFUSED, WRONG = Outcome("right"), Outcome("refused", "recurrent"), Outcome("wrong", "streamed, cold")


def test_all_types_that_generate_text_are_looked_at() -> None:
    found = model_types()
    assert len(found) == len(set(found)) >= 285
    assert {"llama", "gemma4", "qwen3_vl", "voxtral"} <= set(found)


def test_bad_is_what_somebody_would_be_given() -> None:
    assert not Surveyed("a", RIGHT, RIGHT, RIGHT, 1.0).is_bad
    assert not Surveyed("a", REFUSED, RIGHT, RIGHT, 1.0).is_bad
    assert Surveyed("a", WRONG, WRONG, REFUSED, 1.0).is_bad
    assert Surveyed("a", REFUSED, WRONG, RIGHT, 1.0).is_bad, "the self-check let it in"
    assert not Surveyed("a", REFUSED, WRONG, REFUSED, 1.0).is_bad, "the self-check kept it out"
    assert Surveyed("a", Outcome("crash"), Outcome("crash"), REFUSED, 1.0).is_bad


def test_a_refused_type_says_why() -> None:
    found = survey("minimax")
    assert found.shipped.verdict == found.untested.verdict == found.check.verdict == "refused"
    assert "a cache of its own" in found.untested.reason

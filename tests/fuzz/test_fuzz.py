"""Some seconds of fuzzing, always the same cases; and what the fuzzer has to be for its failures to be of use."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layerstream import Completion, CompletionMetrics, SamplingParams, TokenLogprob, Usage

from tests.fuzz import running
from tests.fuzz.cases import Ask, draw_case
from tests.fuzz.judging import bits, difference
from tests.models import FAMILIES

CASES = (3, 4, 5)


@pytest.mark.parametrize("index", CASES)
def test_small_cases(index: int) -> None:
    case = draw_case(0, index, is_small=True)
    outcome = running.run_case(case)
    assert not outcome.failures, f"{case}: python -m tests.fuzz --case 0:{index} --small"
    assert outcome.counts["comparisons of bits"]


def test_a_case_follows_from_its_seed_and_index() -> None:
    assert draw_case(1, 2) == draw_case(1, 2)
    drawn = [draw_case(seed, index) for seed in (1, 2) for index in range(300)]
    assert len(set(drawn)) == len(drawn)
    assert len({case.family for case in drawn}) > 0.9 * len(FAMILIES)
    for name in ("budget", "store", "speculation", "chunk_tokens", "dtype"):
        assert min(Counter(getattr(case, name) for case in drawn).values()) > 5, name


def completion(logprob: float = -1.5, token: int = 7) -> Completion:
    return Completion(
        text="a",
        token_ids=[token],
        finish_reason="length",
        usage=Usage(1, 0, 1),
        metrics=CompletionMetrics(1, 0, 0.0, 0.0),
        logprobs=[TokenLogprob(token, logprob, ((token, logprob),))],
    )


def test_the_last_bit_counts() -> None:
    once = bits([completion()])
    assert difference(bits([completion()]), once) is None
    assert "log-probability at 0" in str(difference(bits([completion(-1.5 + 2**-50)]), once))
    assert "another token at 0" in str(difference(bits([completion(token=8)]), once))
    assert difference(bits([completion(), completion()]), once) is not None


def test_wrong_answers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers, where the model is another one; and in bits, where sampling is with another seed."""
    case = replace(draw_case(0, 3, is_small=True), family="llama", sizes=(), dtype="float32", neighbours=())
    make_model, params, calls = running.make_model, running.params_of, Counter()

    def another(family: str, folder: Path, *, seed: int, sizes: dict[str, int]) -> Any:
        make_model(family, folder, seed=seed, sizes=sizes)
        return make_model(family, folder.parent / "other", seed=seed + 1, sizes=sizes)

    def other_seeds(ask: Ask) -> SamplingParams:
        calls["asked"] += 1
        return replace(params(ask), temperature=2.0, seed=calls["asked"])

    monkeypatch.setattr(running, "make_model", another)
    assert any("alone" in failure for failure in running.run_case(case).failures)
    monkeypatch.setattr(running, "make_model", make_model)
    monkeypatch.setattr(running, "params_of", other_seeds)
    assert any("engine 0" in failure for failure in running.run_case(case).failures)

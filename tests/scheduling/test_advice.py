"""Advice names the change that helps, says about how much, once; and nothing where nothing helps."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream import LayerStream
from layerstream.scheduling import advice
from layerstream.scheduling.advice import PROMPTS, Advice, Advisor, marks_of

PAGE = 32
Tokens = list[int]


class Draw:
    """Prompts about a few of many passages, some of which are asked about again and again."""

    def __init__(self, seed: int, skew: float = 1.6) -> None:
        self.rng = random.Random(seed)
        self.head = self.tokens(50)
        self.passages = [self.tokens(self.rng.randint(190, 230)) for _ in range(60)]
        self.weights = [rank**-skew for rank in range(1, 61)]

    def tokens(self, count: int) -> Tokens:
        return [self.rng.randrange(1000) for _ in range(count)]

    def found(self) -> list[int]:
        """As a retriever ranks them."""
        chosen: dict[int, None] = {}
        while len(chosen) < 4:
            chosen[self.rng.choices(range(60), self.weights)[0]] = None
        return self.rng.sample(list(chosen), 4)

    def join(self, numbers: list[int]) -> Tokens:
        return [token for number in numbers for token in self.passages[number]]


def shared(prompts: list[Tokens]) -> list[int]:
    """What each has in common with the beginning of an earlier one, in whole pages."""
    counts = []
    for number, prompt in enumerate(prompts):
        longest = 0
        for earlier in prompts[:number]:
            pairs = zip(prompt, earlier, strict=False)
            longest = max(longest, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        counts.append(min(longest, len(prompt) - 1) // PAGE * PAGE)
    return counts


def run(draw: Draw, write: Callable[[list[int], Tokens], Tokens]) -> tuple[Advice | None, float]:
    """What is said of prompts that *write* makes, and what share of them is reused."""
    advisor = Advisor(PAGE)
    prompts = [write(draw.found(), draw.tokens(draw.rng.randint(12, 40))) for _ in range(PROMPTS)]
    counts = shared(prompts)
    said = [advisor.note(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert said[:-1] == [None] * (PROMPTS - 1)
    assert advisor.given == said[-1]
    return said[-1], sum(counts) / sum(map(len, prompts))


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_documents_are_to_be_ordered(seed: int) -> None:
    draw = Draw(seed)
    said, reused = run(draw, lambda found, question: [*draw.head, *draw.join(found), *question])
    assert said is not None
    assert said.change == "order"
    assert said.reused == pytest.approx(reused)
    draw = Draw(seed)
    _, after = run(draw, lambda found, question: [*draw.head, *draw.join(sorted(found)), *question])
    assert said.expected == pytest.approx(after, abs=0.1), "sorted by rank of popularity is what is hoped for"


@pytest.mark.parametrize("seed", range(4))
def test_a_question_before_its_context_is_to_be_moved(seed: int) -> None:
    draw = Draw(seed)
    said, _ = run(draw, lambda found, question: [*draw.head, *question, *draw.join(sorted(found))])
    assert said is not None
    assert said.change == "context first"
    draw = Draw(seed)
    _, after = run(draw, lambda found, question: [*draw.head, *draw.join(sorted(found)), *question])
    assert said.expected == pytest.approx(after, abs=0.1)


def test_both_where_neither_helps_alone() -> None:
    draw = Draw(1)
    said, _ = run(draw, lambda found, question: [*draw.head, *question, *draw.join(found)])
    assert said is not None
    assert said.change in ("both", "context first")
    assert said.expected > said.reused + 0.1
    assert "before the question" in str(said)


def test_nothing_is_said_where_prompts_share_nothing_or_reuse_it_already() -> None:
    draw = Draw(1)
    assert run(draw, lambda found, question: draw.tokens(500))[0] is None
    assert run(draw, lambda found, question: [*draw.head, *draw.join([1, 2, 3]), *question])[0] is None
    assert run(draw, lambda found, question: question)[0] is None, "too short"


def test_a_conversation_that_grows_needs_none() -> None:
    draw, said = Draw(1), Tokens()
    said = draw.tokens(300)

    def write(found: list[int], question: Tokens) -> Tokens:
        said.extend(question)
        return list(said)

    assert run(draw, write)[0] is None


def test_it_is_said_once_and_nothing_is_kept_after_it() -> None:
    draw, advisor = Draw(1), Advisor(PAGE)
    said = [advisor.note([*draw.head, *draw.join(draw.found()), *draw.tokens(20)], 0) for _ in range(3 * PROMPTS)]
    assert sum(advice is not None for advice in said) == 1
    assert not advisor._runs


def test_tenants_are_looked_at_alone_and_not_too_many() -> None:
    draw, advisor = Draw(1), Advisor(PAGE)
    shared_prompt = [*draw.head, *draw.join([1, 2, 3])]
    for number in range(3 * PROMPTS):
        assert advisor.note(shared_prompt, 0, str(number)) is None, "each has seen it once"
    assert len(advisor._runs) <= advice.MOST_TENANTS


@given(st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(0, 5), max_size=60))
def test_a_passage_has_the_same_marks_wherever_it_stands(before: Tokens, passage: Tokens) -> None:
    (alone, places), (behind, moved) = marks_of(passage), marks_of([*before, *passage])
    assert behind[len(behind) - len(alone) :] == alone
    assert moved[len(behind) - len(alone) :] == tuple(place + len(before) for place in places)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=8), st.integers(0, 40))
def test_whatever_comes_shares_are_shares(prompts: list[Tokens], num_reused: int) -> None:
    noted = [advice.Noted(*marks_of(p), len(p), min(num_reused, len(p) - 1)) for p in prompts]
    said = advice.advise(noted, 1)
    if said is not None:
        assert 0 <= said.reused < said.expected <= 1
        assert 0 < said.seen <= 1


def test_an_engine_says_it_in_its_log_and_its_stats(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "PROMPTS", 8)
    draw = Draw(1)
    with LayerStream("demo", kv_store=None, progress=False) as engine, caplog.at_level("WARNING"):
        for _ in range(9):
            numbers = draw.rng.sample(range(4), 4)
            prompt = [*draw.head, *draw.join(numbers), *draw.tokens(20)]
            engine.generate([prompt], {"max_tokens": 1, "temperature": 0.0})
            assert engine.stats().advice == "", "who asks for one token warms"
        for _ in range(9):
            prompt = [*draw.head, *draw.join(draw.rng.sample(range(4), 4)), *draw.tokens(20)]
            engine.generate([prompt], {"max_tokens": 2, "temperature": 0.0})
        assert "StablePrefixOrder" in engine.stats().advice
    assert sum("StablePrefixOrder" in record.getMessage() for record in caplog.records) == 1

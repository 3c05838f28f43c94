"""Passages are found in prompts token by token, and the head they are computed behind is the same every time."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from layerstream.core.passages import HEAD_TOKENS
from layerstream.text.passages import (
    EDGE,
    LEAST_TOKENS,
    Composed,
    Heads,
    Passage,
    SeenTexts,
    compose,
    find_passages,
    passages_in,
    words_of,
)


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


@given(st.lists(st.text("abc", min_size=LEAST_TOKENS, max_size=90), min_size=1, max_size=4), st.text("xyz", min_size=2))
def test_every_text_is_found_where_it_stands(texts: list[str], between: str) -> None:
    prompt = between.join(["", *texts, ""])
    for start, stop in (found := find_passages(encode(prompt), texts, encode)):
        assert any(text[EDGE:-EDGE] == prompt[start:stop] for text in texts)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))
    long_enough = [text for text in texts if len(text) >= LEAST_TOKENS + 2 * EDGE]
    if len(set(texts)) == len(texts) and all(a[EDGE:-EDGE] not in b for a in texts for b in texts if a != b):
        assert len(found) >= len(long_enough) - texts.count("")


def test_a_text_that_is_not_there_or_short_is_left_out() -> None:
    text = "q" * 60
    assert find_passages(encode("a" * 100), [text], encode) == []
    assert find_passages(encode("a short one"), ["short"], encode) == []


def test_half_a_token_is_no_match() -> None:
    """Token ids lie side by side in memory; a match must begin with one."""
    ids = [256 * number for number in range(1, 80)]
    shifted = list(range(1, 80))
    assert find_passages(ids, ["x"], lambda _: shifted) == []


def test_composed_prompts_know_their_passages() -> None:
    one, two = Passage("first"), Passage("second")
    text = compose("Use ", one, " and ", compose("or ", two))
    assert isinstance(text, Composed)
    assert text == "Use first and or second"
    assert passages_in(text) == ["first", "second"]
    assert passages_in([{"role": "user", "content": text}]) == ["first", "second"]
    assert passages_in([1, 2, 3]) == []
    assert passages_in("plain") == []


def test_what_was_retrieved_is_found_in_a_prompt_and_forgotten_in_turn() -> None:
    seen = SeenTexts(most=2, most_characters=100)
    seen.add(["  one ", "", "two"])
    assert seen.within("one and two") == ["one", "two"]
    assert seen.within([{"role": "user", "content": [{"type": "text", "text": "two"}]}]) == []
    seen.add(["three"])
    assert seen.within("one two three") == ["three", "two"]
    seen.add(["x" * 200])
    assert seen.within("x" * 300) == [], "more than there is room for"
    assert words_of([{"role": "user", "content": "one"}, {"content": "two"}]) == "one\0two"


def test_the_head_is_what_prompts_of_a_kind_have_in_common() -> None:
    heads = Heads()
    template, questions = list(range(20)), [list(range(100 * n, 100 * n + 30)) for n in range(1, 5)]
    first = heads.head_of([*template, *questions[0]], 50)
    assert len(first) == HEAD_TOKENS, "the first prompt cannot know"
    assert [heads.head_of([*template, *question], 50) for question in questions[1:]] == [template] * 3
    assert heads.head_of([*template, *questions[0]], 50) == template, "the first one too, the next time"
    assert heads.head_of([7, 7, 7], 2) == [7, 7], "another kind"


@given(st.lists(st.lists(st.integers(0, 1), max_size=40), max_size=20))
def test_a_head_is_a_beginning(prompts: list[list[int]]) -> None:
    heads = Heads()
    for prompt in prompts:
        head = heads.head_of(prompt, len(prompt))
        assert prompt[: len(head)] == head
        assert len(head) <= HEAD_TOKENS

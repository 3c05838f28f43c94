"""A traced text is what the plain one is in every operation, and its characters still know where they are from."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.text.traced import SAID, WRITTEN, Traced, as_said, holds_said, join, origin_of, text_of

_LETTERS = "ab -\nxABX\t<>"


def trace(text: str) -> Traced:
    """Capitals were said, all else was written: so a text shows what its origin must be."""
    return Traced(text, "".join(SAID if letter.isupper() else WRITTEN for letter in text))


texts = st.text(_LETTERS, max_size=24)
pieces = st.text(_LETTERS, min_size=1, max_size=3)

OPERATIONS: dict[str, Callable[[Any, str, str, int], Any]] = {
    "strip": lambda text, one, two, number: text.strip(),
    "strip letters": lambda text, one, two, number: text.strip(one),
    "lstrip": lambda text, one, two, number: text.lstrip(one),
    "rstrip": lambda text, one, two, number: text.rstrip(),
    "split": lambda text, one, two, number: text.split(one),
    "split some": lambda text, one, two, number: text.split(one, number),
    "split words": lambda text, one, two, number: text.split(),
    "split some words": lambda text, one, two, number: text.split(None, number),
    "rsplit": lambda text, one, two, number: text.rsplit(one, number),
    "rsplit words": lambda text, one, two, number: text.rsplit(None, number),
    "splitlines": lambda text, one, two, number: text.splitlines(),
    "splitlines whole": lambda text, one, two, number: text.splitlines(True),
    "partition": lambda text, one, two, number: text.partition(one),
    "rpartition": lambda text, one, two, number: text.rpartition(one),
    "removeprefix": lambda text, one, two, number: text.removeprefix(one),
    "removesuffix": lambda text, one, two, number: text.removesuffix(one),
    "replace": lambda text, one, two, number: text.replace(one, two.lower()),
    "replace some": lambda text, one, two, number: text.replace(one, two.lower(), number),
    "slice": lambda text, one, two, number: text[number:],
    "backwards": lambda text, one, two, number: text[::-1],
    "every other": lambda text, one, two, number: text[-number::2],
    "add": lambda text, one, two, number: text + two.lower(),
    "add behind": lambda text, one, two, number: one.lower() + text,
    "times": lambda text, one, two, number: text * number,
    "letters": lambda text, one, two, number: list(text),
    "join": lambda text, one, two, number: text.join([one.lower(), two.lower(), "-"]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=25)
@given(text=texts, one=pieces, two=pieces, number=st.integers(0, 4))
def test_every_operation_gives_what_it_gives_of_plain_text(
    name: str, text: str, one: str, two: str, number: int
) -> None:
    operate = OPERATIONS[name]
    expected, found = operate(text, one, two, number), operate(trace(text), one, two, number)
    assert found == expected
    for part in found if isinstance(found, list | tuple) else [found]:
        assert origin_of(part) == origin_of(trace(part))


@settings(max_examples=25)
@given(text=texts)
def test_what_changes_its_length_was_said(text: str) -> None:
    for change in (str.upper, str.lower, str.title, str.capitalize):
        assert change(trace(text)) == change(text)
        assert getattr(trace(text), change.__name__)()._origin == trace(text)._origin
    assert Traced("ß", WRITTEN).upper()._origin == SAID * 2


@settings(max_examples=25)
@given(parts=st.lists(texts, max_size=4), separator=texts)
def test_join_keeps_both_apart(parts: list[str], separator: str) -> None:
    joined = join(trace(separator), map(trace, parts))
    assert joined == separator.join(parts)
    assert joined._origin == trace(joined)._origin


def test_plain_texts_join_to_a_plain_one() -> None:
    assert type(join("-", ["a", 1, None])) is str


def test_what_is_printed_of_something_that_was_said_was_said() -> None:
    value = as_said({"a": ["b", 1, None, ("c",)]})
    assert value == {"a": ["b", 1, None, ("c",)]}
    assert holds_said(value)
    assert origin_of(text_of(value)) == SAID * len(str(value))
    assert not holds_said(["b", 1, {"a": Traced("b", WRITTEN)}])


def test_copies_know_as_well() -> None:
    text = trace("aB")
    for twin in (copy.copy(text), copy.deepcopy(text), pickle.loads(pickle.dumps(text)), str(text)):
        assert twin == "aB"
        assert origin_of(twin) == WRITTEN + SAID
    assert json.dumps(text) == '"aB"'
    assert {text: 1}["aB"] == 1

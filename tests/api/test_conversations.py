"""Passages come in at the end, and none twice: out of texts, and whatever threads bring them."""

from __future__ import annotations

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.api import conversations
from layerstream.api.conversations import NOTHING_NEW, Growing, leave_out

PASSAGES = st.lists(st.sampled_from(["one", "two\n\nlines", "three", "on", "one more"]), max_size=5)


@given(st.lists(PASSAGES, max_size=2), st.sets(st.sampled_from(["one", "three", "on"])), st.booleans())
def test_what_is_left_is_written_as_if_the_rest_had_never_been_found(found, known: set[str], has_sources: bool) -> None:
    def write(passages: list[str]) -> str:
        return "\n\n".join(f"[source]\n{text}\n(end)" if has_sources else text for text in passages)

    passages = [text for some in found for text in some]
    rest, left_out = leave_out([write(some) for some in found], passages, known)
    seen, number, expected = set(known), 0, []
    for some in found:
        kept = []
        for text in some:
            if text not in seen:
                kept.append(text)
            assert (number in left_out) == (text in seen)
            seen.add(text)
            number += 1
        expected.append(write(kept))
    assert rest == expected


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Found:\n\none\n\ntwo\n\nThat is all.", "Found:\n\ntwo\n\nThat is all."),
        ("Found:\n\none", f"Found:\n\n{NOTHING_NEW}"),
        ("one--two", "--two"),
        ("one", ""),
        ("two", "two"),
        ("a summary of both", "a summary of both"),
        ("", ""),
    ],
)
def test_what_stands_around_passages_stays(text: str, rest: str) -> None:
    assert leave_out([text], ["one", "two"], {"one"})[0] == [rest]
    assert leave_out([text], ["one", "two"], set()) == ([text], [])


@given(st.text(), st.lists(st.text()), st.sets(st.text()))
def test_any_texts(text: str, passages: list[str], known: set[str]) -> None:
    (rest,), left_out = leave_out([text], passages, known)
    assert left_out == sorted(set(left_out))
    if not left_out:
        assert rest == text


def name(item: str) -> str:
    return item.lower()


@pytest.mark.parametrize("only_new", [False, True])
def test_threads_lose_nothing_and_bring_nothing_twice(only_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    append_new = conversations.append_new

    def slow(old, *others):
        time.sleep(1e-4)  # lets another thread in
        return append_new(old, *others)

    class Slow(str):
        __slots__ = ()

        def __hash__(self) -> int:
            time.sleep(1e-5)
            return super().__hash__()

    monkeypatch.setattr(conversations, "append_new", slow)
    num_threads, num_calls = 8, 20
    growing, begin = Growing(Slow), Barrier(num_threads)

    def bring(thread: int) -> list[list[str]]:
        begin.wait()
        calls = range(num_calls)
        brought = [[f"common {call}", f"own {thread} {call}"] for call in calls]
        return [growing.only_new(some) if only_new else growing.grow(some) for some in brought]

    with ThreadPoolExecutor(num_threads) as pool:
        returned = list(pool.map(bring, range(num_threads)))
    everything = {f"common {call}" for call in range(num_calls)}
    everything |= {f"own {thread} {call}" for thread in range(num_threads) for call in range(num_calls)}
    if only_new:
        all_returned = [item for calls in returned for some in calls for item in some]
        assert len(all_returned) == len(everything)
        assert set(all_returned) == everything
        return
    contexts = sorted((some for calls in returned for some in calls), key=len)
    assert len(contexts[-1]) == len(everything)
    assert set(contexts[-1]) == everything
    assert all(contexts[-1][: len(some)] == some for some in contexts), "it only grows"


def test_how_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MOST_ITEMS", 3)
    growing = Growing(name)
    for most in (None, 3, 9):
        growing.reset()
        assert growing.grow("ab", most) == ["a", "b"]
        assert growing.grow("bc", most) == ["a", "b", "c"]
        assert growing.grow("cd", most) == ["c", "d"], "it begins again"
        assert growing.grow("vwxyz", most) == list("vwxyz"), "what is brought is returned"
    assert growing.only_new("ab") == ["a", "b"]
    assert growing.only_new("ca") == ["c"]
    assert growing.only_new("d") == ["d"]
    assert growing.only_new("abc") == ["b"], "what was brought longest ago is forgotten"
    assert growing.only_new("vwxyz") == list("vwxyz")
    assert growing.only_new("zyxwv") == []


def test_copies_go_on_alone() -> None:
    growing = Growing(name)
    growing.grow("ab")
    for other in (copy.deepcopy(growing), pickle.loads(pickle.dumps(growing))):
        assert other.grow("c") == ["a", "b", "c"]
    assert growing.grow("") == ["a", "b"]

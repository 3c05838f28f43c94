"""Stop strings against a search of the whole text, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layerstream.text.stop import StopMatcher


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    shown = [matcher.push(piece) for piece in pieces]
    shown.append(matcher.finish())
    return shown, matcher.matched


def search(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """The text up to the stop string that starts first (of those the shortest), and which one that is."""
    for at in range(len(text)):
        for stop in sorted(stops, key=len):
            if text.startswith(stop, at):
                return text[:at], stop
    return text, None


def test_without_stop_strings_all_text_passes_at_once() -> None:
    assert run((), ["a", "b", ""]) == (["a", "b", "", ""], None)


def test_a_possible_start_is_held_back_and_released() -> None:
    assert run(("\n\nQ:",), ["a\n", "\nQ", " b"]) == (["a", "", "\n\nQ b", ""], None)


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    assert run(("END",), ["one E", "N", "D two", " three"]) == (["one ", "", "", "", ""], "END")


def test_the_end_of_the_text_releases_an_unfinished_stop_string() -> None:
    assert run(("END",), ["one EN"]) == (["one ", "EN"], None)


def test_the_stop_string_that_starts_first_wins() -> None:
    assert run(("b", "abc"), ["xab", "c"]) == (["x", "", ""], "abc")
    assert run(("b", "abc"), ["xab", "d"]) == (["x", "a", ""], "b")
    assert run(("b", "abc"), ["xab"]) == (["x", "a"], "b")


def test_of_two_that_start_together_the_shorter_wins() -> None:
    assert run(("abc", "ab"), ["abc"]) == (["", ""], "ab")


def test_overlapping_starts_are_all_followed() -> None:
    assert run(("aab",), ["a", "a", "a", "b"]) == (["", "", "a", "", ""], "aab")


def test_nothing_is_shown_after_a_match() -> None:
    matcher = StopMatcher(("x",))
    assert matcher.push("ax") == "a"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""
    assert matcher.matched == "x"


words = st.text(alphabet="ab", min_size=1, max_size=4)


@settings(max_examples=500)
@given(stops=st.lists(words, max_size=3).map(tuple), pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=8))
@example(stops=("b", "abab"), pieces=["a", "b", "a"])
def test_any_cutting_gives_what_a_search_of_the_whole_gives(stops: tuple[str, ...], pieces: list[str]) -> None:
    shown, matched = run(stops, pieces)
    assert ("".join(shown), matched) == search(stops, "".join(pieces))


@settings(max_examples=300)
@given(stops=st.lists(words, max_size=3).map(tuple), pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=8))
def test_text_is_held_back_only_while_it_may_be_a_stop_string(stops: tuple[str, ...], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = read = ""
    for piece in pieces:
        shown, read = shown + matcher.push(piece), read + piece
        if matcher.matched is None:
            held = read[len(shown) :]
            assert read.startswith(shown)
            assert not held or any(stop.startswith(held) or held.startswith(stop[:1]) for stop in stops)
            assert len(held) < 2 * max(map(len, stops), default=1)


@pytest.mark.parametrize("stop", ["\n", "</s>", "日本"])
def test_one_character_at_a_time(stop: str) -> None:
    shown, matched = run((stop,), list(f"before{stop}after"))
    assert ("".join(shown), matched) == ("before", stop)

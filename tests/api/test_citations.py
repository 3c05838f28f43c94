"""A grammar of citations admits numbers of passages that are there, and an answer is read back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream import ConfigurationError
from layerstream.api.citations import citation_format, number_passages, read_citations

IDS = st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True)
SAID = st.text(st.characters(blacklist_characters="[]", blacklist_categories=["Cs"]), min_size=1, max_size=20)


@given(ids=IDS, said=st.lists(SAID, min_size=1, max_size=5), data=st.data())
def test_what_matches_cites_what_is_there(ids: list[int], said: list[str], data: st.DataObject) -> None:
    cited = [data.draw(st.sampled_from(ids)) for _ in said]
    answer = "".join(f"{text}[{number}]" for text, number in zip(said, cited, strict=True))
    for required in (True, False):
        assert re.fullmatch(citation_format(ids, required=required)["regex"], answer)
    assert read_citations(answer).ids == tuple(dict.fromkeys(cited))
    other = answer + f"[{max(ids) + 1}]"
    assert not re.fullmatch(citation_format(ids)["regex"], other)
    assert not re.fullmatch(citation_format(ids, required=False)["regex"], other)
    assert max(ids) + 1 not in read_citations(other, ids).ids


def test_an_answer_may_have_to_cite() -> None:
    assert not re.fullmatch(citation_format([1])["regex"], "Sluba leads it.")
    assert re.fullmatch(citation_format([1])["regex"], "Sluba leads it [1].")
    assert re.fullmatch(citation_format([1], required=False)["regex"], "Sluba leads it.")


def test_text_and_numbers() -> None:
    found = read_citations(" Sluba leads it [2], since May [1][2]. ")
    assert (found.text, found.ids) == ("Sluba leads it, since May.", (2, 1))


def test_passages_have_no_numbers_of_others() -> None:
    assert number_passages(["One [2] of", "two"]) == "[1] One (2) of\n\n[2] two"


@pytest.mark.parametrize("ids", [[], [-1], ["1"], [True], range(2000)])
def test_ids_are_numbers(ids: object) -> None:
    with pytest.raises(ConfigurationError, match="ids"):
        citation_format(ids)  # type: ignore[arg-type]

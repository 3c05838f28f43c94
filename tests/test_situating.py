"""Lines that say where chunks stand: asked at once, behind the document or a window of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream import ConfigurationError, LayerStream, RequestTimeout
from layerstream.situating import Chunked, Failures, Situating, rejoin, spans_of, windows_of

SENTENCES = [f"In year {year} the hall of Brenvik had {year % 7} doors and {year % 11} windows." for year in range(40)]
DOCUMENT = " ".join(SENTENCES)
CHUNKS = [" ".join(SENTENCES[at : at + 2]) for at in range(0, 40, 2)]
TEXT = st.text("ab \n", max_size=60)


@pytest.fixture
def engine() -> Iterator[LayerStream]:
    with LayerStream("demo", kv_store=None, progress=False, chunk_tokens=32, speculation="off") as engine:
        yield engine


def situate(engine: LayerStream, text: str, chunks: list[str], **options: Any) -> list[str]:
    """A line for each of *chunks* of the document *text*."""
    (lines,) = Situating(**options).lines(engine, [Chunked(text, chunks)])
    return lines


def cost(engine: LayerStream, document: str, chunks: list[str]) -> tuple[int, int, list[str]]:
    """Sweeps, prompt and answer tokens that were computed, and the lines."""
    before = engine.stats()
    lines = situate(engine, document, chunks, max_tokens=12)
    after = engine.stats()
    return after.sweeps - before.sweeps, after.tokens_in - before.tokens_in, lines


def listen(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is submitted from now on."""
    asked: list[Any] = []
    submit = engine.submit_many

    def submit_many(prompts: Any, *more: Any, **terms: Any) -> Any:
        asked.append(prompts)
        return submit(prompts, *more, **terms)

    monkeypatch.setattr(engine, "submit_many", submit_many)
    return asked


def test_all_lines_take_about_the_sweeps_of_one(engine: LayerStream) -> None:
    """And the document is computed once."""
    alone, _, one = cost(engine, DOCUMENT, CHUNKS[3:4])
    document = "Something else. " + DOCUMENT
    together, computed, lines = cost(engine, document, CHUNKS)
    assert together <= alone + -(-computed // engine.plan.max_sweep_tokens), "but for what a sweep carries of a prompt"
    prompts = Situating()._prompts(engine, Chunked(document, CHUNKS), Failures())
    shared = next(at for at, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    own = max(map(len, prompts)) - shared
    assert computed <= len(prompts[0]) + len(CHUNKS) * (own + engine.plan.page_tokens + 12)
    assert len(lines) == len(CHUNKS)
    assert one == situate(engine, DOCUMENT, CHUNKS[3:4], max_tokens=12), "the same every time"


def test_a_line_does_not_depend_on_its_neighbours(engine: LayerStream) -> None:
    together = situate(engine, DOCUMENT, CHUNKS[:4], max_tokens=8)
    assert [situate(engine, DOCUMENT, [chunk], max_tokens=8)[0] for chunk in CHUNKS[:4]] == together
    assert all("\n" not in line and line == line.strip() for line in together)


def test_documents_are_asked_in_groups(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = listen(engine, monkeypatch)
    documents = [Chunked(" ".join(CHUNKS[:n]), CHUNKS[:n]) for n in (3, 2, 9, 1, 0, 4)]
    lines = list(Situating(max_tokens=2, at_once=5).lines(engine, iter(documents)))
    assert [len(own) for own in lines] == [3, 2, 9, 1, 0, 4]
    assert [len(prompts) for prompts in asked] == [5, 9, 5]
    assert list(Situating().lines(engine, [])) == []
    assert situate(engine, "", []) == []


def test_of_a_long_document_a_window_is_shown(
    engine: LayerStream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "layerstream.situating")
    long = " ".join(f"Page {page}. {DOCUMENT}" for page in range(12))
    chunks = [f"Page {page}." for page in range(12)]
    groups = listen(engine, monkeypatch)
    assert len(situate(engine, long, chunks, max_tokens=4)) == 12
    (asked,) = groups
    shown = [engine.tokenizer.decode(ids) for ids in asked]
    assert all(len(ids) + 4 <= engine.context_length for ids in asked)
    assert all(text.count(f"Page {page}.") >= 2 for page, text in enumerate(shown)), "in its window, and as the part"
    assert len({text[: len(text) // 2] for text in shown}) < 12, "neighbours share a window"
    assert "in windows" in caplog.text


def test_a_chunk_that_is_too_long_harms_no_other(
    engine: LayerStream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = DOCUMENT * 12
    groups = listen(engine, monkeypatch)
    expected = situate(engine, DOCUMENT, CHUNKS, max_tokens=8)
    lines = situate(engine, DOCUMENT, [*CHUNKS[:2], long, *CHUNKS[2:]], max_tokens=8)
    assert lines == [*expected[:2], "", *expected[2:]]
    assert groups[0] == groups[1], "and takes no room from them"
    assert caplog.text.count("gets no line") == 1
    assert list(Situating().lines(engine, [Chunked(long, [long]), Chunked(long, [long, long])])) == [[""], ["", ""]]
    assert caplog.text.count("gets no line") == 2, "once a call"


def test_a_chunk_that_leaves_its_document_no_room_takes_none_from_others(
    engine: LayerStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown next to nothing of it, and they are shown all of it."""
    long = (DOCUMENT * 2)[: len(DOCUMENT) * 1700 // len(engine.encode(DOCUMENT))]
    groups = listen(engine, monkeypatch)
    expected = situate(engine, DOCUMENT, CHUNKS[:2], max_tokens=300)
    assert situate(engine, DOCUMENT, [CHUNKS[0], long, CHUNKS[1]], max_tokens=300)[::2] == expected
    assert [groups[1][0], groups[1][2]] == groups[0]
    assert engine.context_length - 300 < len(groups[1][1]) < engine.context_length


def test_a_request_that_fails_is_its_own_chunks(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = situate(engine, DOCUMENT, CHUNKS[:4], max_tokens=8)
    submit = engine.submit_many

    def submit_many(*prompts: Any, **terms: Any) -> Any:
        requests = submit(*prompts, **terms)
        requests[1].fail(RequestTimeout("it took too long"))
        return requests

    monkeypatch.setattr(engine, "submit_many", submit_many)
    assert situate(engine, DOCUMENT, CHUNKS[:4], max_tokens=8) == [expected[0], "", *expected[2:]]


def test_more_chunks_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"kv_store": None, "progress": False, "chunk_tokens": 32, "speculation": "off"}
    with LayerStream("demo", **options) as engine:
        expected = situate(engine, DOCUMENT, CHUNKS, max_tokens=4)
    with LayerStream("demo", **options, max_queued=3) as engine:
        groups = listen(engine, monkeypatch)
        assert situate(engine, DOCUMENT, CHUNKS, max_tokens=4) == expected
        assert max(map(len, groups)) == 3


@pytest.mark.parametrize("instructions", ["{chunk} of {document}", "{document}", "Summarise."])
def test_instructions_put_the_document_first(instructions: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\{document\}"):
        Situating(instructions)


def test_braces_in_a_document_are_text(engine: LayerStream) -> None:
    assert len(situate(engine, "{chunk} {document} {0}", ["{document}"], max_tokens=2)) == 1


@given(
    st.integers(0, 500), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 100)), max_size=10), st.integers(1, 600)
)
def test_windows(length: int, begins: list[tuple[int, int]], size: int) -> None:
    spans = [(min(at, length), min(at + more, length)) for at, more in begins]
    for (start, end), (first, last) in zip(spans, windows_of(length, spans, size), strict=True):
        assert 0 <= first <= last <= length
        assert last - first == min(size, length)
        if 2 * (end - start) <= size and size < length:
            assert first <= start, "what is at most half a window stands in it"
            assert end <= last


@given(TEXT, st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=8))
def test_a_document_is_put_together_from_its_pieces(text: str, cuts: list[tuple[int, int]]) -> None:
    pieces = [(text[at : at + size], at) for at, size in cuts if text[at : at + size]]
    joined, starts = rejoin(pieces)
    assert [joined[start : start + len(piece)] for (piece, _), start in zip(pieces, starts, strict=True)] == [
        piece for piece, _ in pieces
    ]
    covered = {at for _, begin in pieces for at in range(begin, begin + len(_))}
    gaps = sum(1 for at in covered if at + 1 not in covered) - bool(covered)
    assert len(joined) == len(covered) + gaps, "overlaps once, a line for each gap"


@given(st.lists(st.text("ab", min_size=1, max_size=9), max_size=6))
def test_pieces_that_do_not_say_where_they_were(pieces: list[str]) -> None:
    joined, starts = rejoin([(piece, None) for piece in pieces])
    assert joined == "\n\n".join(pieces)
    assert all(joined.startswith(piece, start) for piece, start in zip(pieces, starts, strict=True))


@given(TEXT, st.lists(TEXT, max_size=6))
def test_spans_are_within_the_document(document: str, chunks: list[str]) -> None:
    spans = spans_of(document, chunks)
    assert len(spans) == len(chunks)
    assert all(0 <= start <= end <= len(document) for start, end in spans)


def test_spans_of_what_was_cut_in_order() -> None:
    words = re.findall(r"\S+", "a b a c a")
    assert [start for start, _ in spans_of("a b a c a", words)] == [0, 2, 4, 6, 8]


def test_pages_of_a_file_that_each_count_from_zero_lose_nothing() -> None:
    """A loader of PDFs gives a document per page, all of one source."""
    text, starts = rejoin([("The first page says this.", 0), ("Quite another thing is on page two.", 0)])
    assert "The first page says this." in text
    assert "Quite another thing is on page two." in text
    assert [text[start:].startswith(piece) for start, piece in zip(starts, ("The first", "Quite"), strict=True)] == [
        True,
        True,
    ]

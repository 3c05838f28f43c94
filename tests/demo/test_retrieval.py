"""Documents to passages, questions to the right ones."""

from __future__ import annotations

import string
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream import DocumentError, MissingExtra
from layerstream.demo.retrieval import Document, Passage, Retriever, join_passages, load_documents, split_passages

PDF = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 100]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>endobj
4 0 obj<</Length 55>>stream
BT /F 12 Tf 10 50 Td (The lighthouse is red.) Tj ET
endstream endobj
5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj
trailer<</Root 1 0 R>>
startxref
0
%%EOF
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "travel.md").write_text("# Travel\n\nTrips are approved by Mira.\n\nTickets are bought by Otto.")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "food.txt").write_bytes("\ufeffThe café opens at noon.".encode())
    (tmp_path / "notes" / "empty.txt").write_text(" \n")
    (tmp_path / "harbour.PDF").write_bytes(PDF)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_reads_text_markdown_and_pdf_by_name(folder: Path) -> None:
    documents = load_documents(folder)
    assert [document.name for document in documents] == ["harbour.PDF", "notes/food.txt", "travel.md"]
    assert documents[0].text.strip() == "The lighthouse is red."
    assert documents[1].text == "The café opens at noon."


def test_reads_a_single_file(folder: Path) -> None:
    assert [document.name for document in load_documents(folder / "travel.md")] == ["travel.md"]


def test_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no such folder"):
        load_documents(tmp_path / "nowhere")
    with pytest.raises(DocumentError, match="no txt, md or pdf file"):
        load_documents(tmp_path)
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnot much")
    with pytest.raises(DocumentError, match=r"broken.pdf is no PDF that can be read"):
        load_documents(tmp_path)


def test_one_file_does_not_stand_in_the_way_of_the_others(folder: Path) -> None:
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4\nnot much")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 9)
    said: list[str] = []
    assert len(load_documents(folder, said.append)) == 3
    (line,) = said
    assert line.startswith("3 files read, 3 skipped: binary.txt is binary, no text; broken.pdf is no PDF that can be ")
    assert line.endswith("; notes/empty.txt is empty")


def test_nothing_is_said_where_all_is_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes" / "empty.txt").unlink()
    load_documents(folder)
    assert not caplog.records


def test_a_folder_where_nothing_can_be_read_says_why_for_each_but_has_an_end(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_bytes(b"")
    with pytest.raises(DocumentError, match=r"00.txt is empty; .*09.txt is empty; and 20 more$"):
        load_documents(tmp_path)


def test_a_question_about_the_whole_reads_what_documents_begin_with(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.md").write_text("\n\n".join(f"{name} {number} " + "x" * 1400 for number in range(3)))
    retriever = Retriever(load_documents(tmp_path))
    assert [(passage.document, passage.index) for passage in retriever.opening(3)] == [
        ("a.md", 0), ("b.md", 0), ("a.md", 1),
    ]  # fmt: skip
    assert len(retriever.opening(99)) == 6


def test_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(MissingExtra, match=r"pypdf is not installed; .* pip install 'layerstream\[documents\]'"):
        load_documents(folder)


def test_paragraphs_stay_whole_where_they_fit() -> None:
    document = Document("a", "one two\n\nthree\n \nfour five six seven\n\n\n\neight")
    assert split_passages(document, limit=14) == [
        Passage("a", 0, "one two\n\nthree"),
        Passage("a", 1, "four five six"),
        Passage("a", 2, "seven\n\neight"),
    ]


@given(st.text(string.ascii_lowercase + "  \n"), st.integers(1, 20))
def test_passages_keep_every_letter_within_the_limit(text: str, limit: int) -> None:
    passages = split_passages(Document("a", text), limit)
    assert all(0 < len(passage.text) <= limit for passage in passages)
    assert "".join("".join(passage.text.split()) for passage in passages) == "".join(text.split())
    assert [passage.index for passage in passages] == list(range(len(passages)))


def test_finds_what_the_question_is_about(folder: Path) -> None:
    retriever = Retriever(load_documents(folder))
    assert [passage.document for passage in retriever.retrieve("When does the café open at noon?")] == [
        "notes/food.txt"
    ]
    assert retriever.retrieve("Which colour has the lighthouse?", 1)[0].document == "harbour.PDF"
    assert retriever.retrieve("Tell me about travel", 2)[0].document == "travel.md"
    assert retriever.retrieve("zzz") == []
    assert retriever.retrieve("") == []


def test_context_does_not_depend_on_the_rank() -> None:
    first, second = Passage("a", 1, "x"), Passage("b", 0, "y")
    assert join_passages([second, first]) == join_passages([first, second]) == "x\n\ny"

"""Files to texts: in whatever encoding, or with the reason why there is none."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.demo.reading import Unreadable, decode, read_text

from tests.demo.test_retrieval import PDF

FRENCH = "Le café est à Genève. Ça va? L'hôtel est près de la forêt."
TEXTS = [
    ("utf-8", FRENCH),
    ("utf-8-sig", FRENCH),
    ("latin-1", FRENCH),
    ("latin-1", "El niño comió una piñata en España."),
    ("latin-1", "résumé"),
    ("latin-1", "Smørrebrød på bordet, æbler og øl."),
    ("cp1252", "The “quoted” café — opens at noon."),
    ("cp1252", "Price: 5 €"),
    ("utf-16", FRENCH),
    ("utf-16-le", "Hello world, the lighthouse is red."),
    ("utf-16-be", FRENCH),
    ("utf-32", FRENCH),
    ("cp1250", "Zażółć gęślą jaźń. Podróże zatwierdza Mira, bilety kupuje Otto."),
    ("cp1251", "Маяк красный. Поездки утверждает Мира, билеты покупает Отто."),
    ("gb18030", "灯塔是红色的。旅行由米拉批准。"),
    ("utf-8", "灯台は赤い。"),
    ("ascii", "plain"),
]
IMAGE = (
    b"4 0 obj<</Type/XObject/Subtype/Image/Width 1/Height 1/ColorSpace/DeviceGray/BitsPerComponent 8/Length 1>>"
    b"stream\nx\nendstream endobj\n"
)
SCAN = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</XObject<</I 4 0 R>>>>>>endobj\n"
    + IMAGE
    + b"trailer<</Root 1 0 R>>\nstartxref\n0\n%%EOF\n"
)


@pytest.mark.parametrize(("encoding", "text"), TEXTS)
def test_a_text_is_read_in_its_encoding(encoding: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert read_text(path) == text


def test_utf_8_with_a_byte_that_is_wrong_stays_utf_8() -> None:
    data = bytearray(FRENCH.encode())
    data[1] = 0xFF
    assert decode(bytes(data)) == "L\ufffd" + FRENCH[2:]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_every_text_in_utf_8_comes_back(text: str) -> None:
    assert decode(text.encode()) == text.removeprefix("\ufeff")


@given(st.binary(min_size=1, max_size=300))
def test_whatever_bytes_are_text_or_refused(data: bytes) -> None:
    with contextlib.suppress(Unreadable):
        assert "\0" not in decode(data)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A file of every kind that has no text to read."""
    (tmp_path / "nothing.txt").write_bytes(b"")
    (tmp_path / "blank.md").write_text(" \n\t\n")
    (tmp_path / "mark.txt").write_bytes("\ufeff".encode())
    (tmp_path / "program.txt").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + bytes(range(256)) * 4)
    (tmp_path / "zeros.txt").write_bytes(bytes(100))
    (tmp_path / "archive.md").write_bytes(b"PK\x03\x04\x14\x00\x08\x08" + bytes(range(255, 0, -1)) * 4)
    (tmp_path / "nothing.pdf").write_bytes(b"")
    (tmp_path / "head.pdf").write_bytes(b"%PDF-1.4\nnot much")
    (tmp_path / "half.pdf").write_bytes(PDF[:200])
    (tmp_path / "page.pdf").write_bytes(b"<html>404</html>")
    (tmp_path / "scan.pdf").write_bytes(SCAN)
    (tmp_path / "blank.pdf").write_bytes(SCAN.replace(b"/XObject<</I 4 0 R>>", b""))
    (tmp_path / "loop.pdf").write_bytes(PDF.replace(b"/Kids[3 0 R]", b"/Kids[2 0 R]"))
    writer = pypdf.PdfWriter()
    writer.add_blank_page(9, 9)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing.txt", "is empty"),
        ("blank.md", "is empty"),
        ("mark.txt", "is empty"),
        ("program.txt", "is binary"),
        ("zeros.txt", "is binary"),
        ("archive.md", "is binary"),
        ("nothing.pdf", "is empty"),
        ("head.pdf", "is no PDF that can be read"),
        ("half.pdf", "is no PDF that can be read"),
        ("page.pdf", "is no PDF that can be read"),
        ("scan.pdf", "is a scan, pages without text"),
        ("blank.pdf", "is empty"),
        ("loop.pdf", "is"),
        ("locked.pdf", "is encrypted: save it without its password"),
    ],
)
def test_a_file_without_text_says_why(files: Path, name: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(Unreadable, match=f"^{reason}"):
        read_text(files / name)
    assert not caplog.records, "what pypdf has to say is in the reason"


@given(data=st.data())
def test_no_damage_to_a_pdf_is_anything_else(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    damaged = bytearray(PDF)
    for position, byte in data.draw(st.lists(st.tuples(st.integers(0, len(PDF) - 1), st.integers(0, 255)), max_size=9)):
        damaged[position] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.pdf"
    path.write_bytes(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))
    with contextlib.suppress(Unreadable):
        assert read_text(path).strip()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_is_locked_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(Unreadable, match="cannot be read: Permission denied"):
        read_text(tmp_path / "a.txt")

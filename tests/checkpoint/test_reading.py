"""One door: whatever a file is or has in it, what comes out is an object or an error of ours, at once."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.checkpoint.reading import (
    MAX_DEPTH,
    check_file,
    check_side_files,
    explained,
    parse_object,
    read_object,
)
from layerstream.errors import CheckpointError, CheckpointNotFound, InvalidHeader, UnsupportedModel

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans())
def test_what_is_json_comes_in_as_it_is(value: dict[str, Any], is_ascii: bool) -> None:
    try:
        raw = json.dumps(value, ensure_ascii=is_ascii).encode()
    except UnicodeEncodeError:
        return
    assert parse_object(raw, "x", unique=True) == value


@given(st.binary(max_size=60) | st.text('[]{}":,\\a1 ', max_size=60).map(str.encode))
def test_random_bytes_are_an_object_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(parse_object(raw, "x"), dict)
    except InvalidHeader:
        return


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[1]", "a JSON list, expected an object"),
        (b"3", "a JSON int"),
        (b'{"a":' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a":-' + b"9" * 400 + b"}", "digits"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested 200001 deep"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested 300 deep"),
        (b"[" * 1_000_000, "nested"),
        (b'{"a": "' + b"[" * 500, "not JSON|nested"),
        (b'{"a": 1, "a": 2}', "more than once"),
    ],
)
def test_what_is_hostile_is_named(raw: bytes, words: str) -> None:
    with pytest.raises(InvalidHeader, match=words):
        parse_object(raw, "x", unique=True)


def test_brackets_in_strings_are_no_nesting() -> None:
    text = '\\"[{' * 400
    assert parse_object(json.dumps({text: text}).encode(), "x") == {text: text}
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert parse_object(json.dumps({"a": deep}).encode(), "x") == {"a": deep}


def test_nesting_is_bounded_whatever_python_would_stand() -> None:
    """With a high limit Python's own reader would overflow the stack, which ends the process."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        with pytest.raises(InvalidHeader, match="deep"):
            parse_object(b"[" * 10**6, "x")
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "nothing", "link", "lfs", "loop"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = Path("config.json")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to("gone")
    elif kind == "loop":
        path.symlink_to("config.json")
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    expected = {"nothing": CheckpointNotFound, "link": CheckpointNotFound, "lfs": CheckpointNotFound}
    with pytest.raises(expected.get(kind, CheckpointError), match=r"config\.json"):
        check_file(path)
    with pytest.raises(CheckpointError):
        read_object(path)
    if kind not in {"nothing", "folder"}:
        with pytest.raises(CheckpointError):
            check_side_files(Path())


def test_a_name_with_a_zero_byte_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        check_file(tmp_path / "a\0b")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InvalidHeader, match="at most"):
        read_object(tmp_path / "x.json")


def test_a_file_that_cannot_be_read_is_ours_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("{}")

    def failing(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        read_object(tmp_path / "x.json")


class PanicException(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("raised", [KeyError("x"), RecursionError(), PanicException("x"), MemoryError(), OSError(5)])
def test_what_libraries_raise_is_ours(raised: BaseException) -> None:
    with pytest.raises(InvalidHeader, match="no tokenizer") as caught, explained("no tokenizer"):
        raise raised
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), UnsupportedModel("x"), SystemExit()])
def test_what_is_not_the_files_fault_goes_through(raised: BaseException) -> None:
    with pytest.raises(type(raised)), explained("no tokenizer"):
        raise raised

"""The one door by which a model's files come in: they are hostile until proven otherwise.

Nothing of a checkpoint is opened before :func:`check_file` has seen that it is a file, and no JSON is parsed but by
:func:`parse_object`, within limits on size, nesting and digits. What libraries make of the files runs within
:func:`explained`. So whatever is wrong with a file is a :class:`~layerstream.errors.CheckpointError` that names it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from layerstream.errors import CheckpointError, CheckpointNotFound, InvalidHeader, LayerStreamError

MAX_JSON_BYTES = 100_000_000  # the bound that safetensors sets for its headers
MAX_DEPTH = 100
MAX_DIGITS = 308  # a number of more is beyond the largest that a float can be
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: Path) -> int:
    """The bytes of *path*, which is a file that can be read and has what its name says.

    Raises:
        CheckpointNotFound: there is nothing, or a link that leads nowhere, or what git-lfs has in place of a file.
        InvalidHeader: something that is no file.
        CheckpointError: it may not be read, or the disk fails.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "no file")
            raise InvalidHeader(f"{path}: is {kind}, and a file is expected; fetch the model again")
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except (FileNotFoundError, ValueError):  # a name with a zero byte is no name
        raise _not_there(path) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); see who owns it, and the disk") from error
    if start == LFS_POINTER:
        raise CheckpointNotFound(
            f"{path}: is a git-lfs pointer, which stands for a file that was not fetched: run 'git lfs pull' in "
            f"{path.parent}"
        )
    return found.st_size


def check_side_files(folder: Path) -> None:
    """See that what libraries may open in *folder* are files; weights are seen to when they are opened.

    Raises:
        As :func:`check_file`.
    """
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and not path.name.endswith((".safetensors", ".gguf")) and not path.is_dir():
            check_file(path)


def read_object(path: Path, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint.

    Raises:
        As :func:`check_file` and :func:`parse_object`.
    """
    num_bytes = check_file(path)
    if num_bytes > most_bytes:
        raise InvalidHeader(f"{path}: has {num_bytes} bytes; at most {most_bytes} are accepted")
    return parse_object(path.read_bytes(), str(path))


def parse_object(raw: bytes, where: str, *, unique: bool = False) -> dict[str, Any]:
    """The object that *raw* is the JSON of.

    Args:
        where: what it was read from, for the message.
        unique: a name may not stand in an object twice.

    Raises:
        InvalidHeader: it is not JSON, no object, nested too deep, or has numbers of too many digits.
    """
    depth = _depth(raw)
    if depth > MAX_DEPTH:
        raise InvalidHeader(f"{where}: is nested {depth} deep; at most {MAX_DEPTH} are accepted: fetch it again")

    def pairs_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise InvalidHeader(f"{where}: a name stands in it more than once; fetch it again")
        return names

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise InvalidHeader(f"{where}: has a number of {len(digits)} digits; at most {MAX_DIGITS} are accepted")
        return int(digits)

    try:
        value = json.loads(raw.decode("utf-8"), parse_int=whole, object_pairs_hook=pairs_of if unique else None)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidHeader(f"{where}: not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise InvalidHeader(f"{where}: a JSON {type(value).__name__}, expected an object; fetch it again")
    return value


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of the libraries that read a checkpoint's files as ours; *what* could not be done, and why.

    Raises:
        InvalidHeader: in place of what a library raised.
    """
    try:
        yield
    except LayerStreamError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of a library in Rust; no Exception
        if not isinstance(error, Exception) and not is_panic:
            raise
        raise InvalidHeader(f"{what} ({type(error).__name__}: {error!s:.400})") from error


def _depth(raw: bytes) -> int:
    """How deep the brackets of *raw* are nested, those in strings left out."""
    brackets = _STRING.sub(b"", raw).translate(None, _NOT_BRACKETS)
    steps = np.isin(np.frombuffer(brackets, np.uint8), np.frombuffer(b"[{", np.uint8)).astype(np.int32)
    return int(np.cumsum(2 * steps - 1).max(initial=0))


def _not_there(path: Path) -> CheckpointNotFound:
    if path.is_symlink():
        return CheckpointNotFound(
            f"{path}: is a link to {os.readlink(path)}, which is not there; a cache of the hub was emptied or is not "
            "whole: fetch the model again"
        )
    found = f"; found: {_names(item.name for item in path.parent.iterdir())}" if path.parent.is_dir() else ""
    name = repr(path.name)[1:-1]  # it may have anything in it
    return CheckpointNotFound(f"{path.parent}: there is no {name}{found}")


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:8]) or "nothing"

"""Small files that are there whole or not at all, whoever else writes them or dies."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from layerstream.errors import ConfigurationError

TEMPORARY = ".tmp"


def temporary_path(path: Path) -> Path:
    """Where *path* is written before it takes its name: no other thread or process has the same."""
    return path.with_name(f"{os.getpid()}-{os.urandom(6).hex()}-{path.name}{TEMPORARY}")


def writer_of(temporary: Path) -> int | None:
    """The process that :func:`temporary_path` was called by; ``None``: it was not."""
    pid = temporary.name.split("-")[0]
    return int(pid) if pid.isdigit() else None


def check_writable(path: Path) -> None:
    """That a file can be written to *path*, before anything is computed for it.

    Raises:
        ConfigurationError: it has no folder, or cannot be written.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigurationError(f"{path}: there is no folder {folder}: make it, or name another")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigurationError(f"{path} cannot be written: name a file in a folder of yours")


def write_whole(path: Path, text: str, *, is_private: bool = False) -> None:
    """Have *path* hold *text*, for its owner alone if *is_private*; on failure it is as it was.

    Raises:
        OSError: the folder is not there, or the disk is full.
    """
    temporary = temporary_path(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if is_private else 0o666)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise

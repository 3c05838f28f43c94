"""Small files that are there whole or not at all, whoever else writes them or dies."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TEMPORARY = ".tmp"


def temporary_path(path: Path) -> Path:
    """Where *path* is written before it takes its name: no other thread or process has the same."""
    return path.with_name(f"{os.getpid()}-{os.urandom(6).hex()}-{path.name}{TEMPORARY}")


def writer_of(temporary: Path) -> int | None:
    """The process that :func:`temporary_path` was called by; ``None``: it was not."""
    pid = temporary.name.split("-")[0]
    return int(pid) if pid.isdigit() else None


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

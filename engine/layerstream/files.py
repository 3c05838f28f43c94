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


def write_whole(path: Path, text: str) -> None:
    """Have *path* hold *text*; on failure it is as it was.

    Raises:
        OSError: the folder is not there, or the disk is full.
    """
    temporary = temporary_path(path)
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise

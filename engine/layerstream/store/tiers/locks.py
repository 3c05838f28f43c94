"""Locks on segment files: whoever reads one keeps all others from removing it. Advisory, and gone with the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be removed anyway
    fcntl = None


def open_locked(path: Path) -> int:
    """A descriptor of *path* that keeps it from being removed until it is closed. Never waits.

    Raises:
        OSError: it is not there, is just being removed, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not path.exists():
            raise FileNotFoundError(f"{path}: it was removed just now")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked_for_removal(path: Path) -> Iterator[bool]:
    """Whether nobody reads *path*, while inside; a file that is not there is read by nobody."""
    try:
        descriptor = None if fcntl is None else os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        descriptor = None
    if descriptor is None or fcntl is None:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)

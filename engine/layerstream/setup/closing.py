"""What has something to let go of, and is let go of in the opposite order of its making."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)


class Closeable(Protocol):
    """Has something to let go of."""

    def close(self) -> None:
        """Let go of it."""
        ...


Part = TypeVar("Part", bound=Closeable)


class Closing:
    """Closes parts, the newest first. What one cannot do is logged, and the others do theirs.

    As a context it closes them where an error leaves it; else they live on, until :meth:`close`.
    """

    def __init__(self) -> None:
        self._parts = ExitStack()

    def keep(self, part: Part) -> Part:
        """Take on that *part* is closed."""
        self._parts.callback(_close, part)
        return part

    def close(self) -> None:
        """Close all of them. Idempotent; never raises."""
        self._parts.close()

    def __enter__(self) -> Closing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.close()


def _close(part: Closeable) -> None:
    try:
        part.close()
    except Exception:
        logger.exception("a %s could not be closed", type(part).__name__)

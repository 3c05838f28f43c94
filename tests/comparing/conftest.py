"""Models here are small enough to be cut and streamed in a moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import shrink_units
from tests.pretend import PretendCuda, pretend_cuda


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """See :func:`tests.harness.shrink_units`."""
    shrink_units(monkeypatch)


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """See :func:`tests.pretend.pretend_cuda`."""
    with pretend_cuda(monkeypatch) as device:
        yield device

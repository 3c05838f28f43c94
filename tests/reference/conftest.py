"""All tests here run on models small enough to be cut and streamed in a moment."""

from __future__ import annotations

import pytest

from tests.harness import shrink_units


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """See :func:`tests.harness.shrink_units`."""
    shrink_units(monkeypatch)

"""Memory of the host, in one piece."""

from __future__ import annotations

import pytest
from layerstream.errors import OutOfMemory
from layerstream.hardware.arena import Arena


def test_more_than_the_system_gives_is_said() -> None:
    with pytest.raises(OutOfMemory, match=r"does not give 1024\.0 TiB of memory"):
        Arena(2**50)

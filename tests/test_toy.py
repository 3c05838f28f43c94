"""The bundled reader is no model to judge by, and whoever named none is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream import LayerStream
from layerstream.engine import _say_that_a_toy_answers


def test_it_is_said_once_in_a_process_and_of_no_other_model(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    _say_that_a_toy_answers.cache_clear()
    for model in ("demo", "demo", str(folder)):
        with LayerStream(model, progress=False):
            pass
    said = [record.getMessage() for record in caplog.records if "toy" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the bundled 3.5 MiB toy answers")

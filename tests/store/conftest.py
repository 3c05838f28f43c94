"""A model that a test of the store may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import add_tokenizer
from tests.models import make_model


@pytest.fixture
def model(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A small Llama's folder, the test's own."""
    folder = tmp_path / "model"
    make_model("llama", folder)
    add_tokenizer(folder, tokenizer_folder)
    return folder

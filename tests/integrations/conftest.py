"""A model for what the grammar carries: it babbles, and it likes to close its strings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models import make_model, make_tokenizer

CAPABLE = os.environ.get("LAYERSTREAM_TEST_MODEL")
"""An instruct model that understands what it is asked, for the tests that need one."""

needs_a_capable_model = pytest.mark.xfail(
    CAPABLE is None, reason="only an instruct model can answer this: name one in LAYERSTREAM_TEST_MODEL", strict=False
)


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small random model whose texts end: quotes and brackets are likely.

    (Phi, because its head has a bias.) With ``LAYERSTREAM_TEST_MODEL``, that model instead.
    """
    if CAPABLE is not None:
        return CAPABLE
    folder = tmp_path_factory.mktemp("babbler")
    tokenizer = make_tokenizer()
    model = make_model("phi", Path(folder), sizes={"max_position_embeddings": 4096})
    for text, likes in (('"', 4.0), ("}", 3.0), ("]", 3.0)):
        model.lm_head.bias.data[tokenizer.convert_tokens_to_ids(text)] += likes
    model.lm_head.bias.data[tokenizer.eos_token_id] -= 4.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

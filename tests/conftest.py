"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.models import make_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LAYERSTREAM_KV_STORE"] = "off"  # tests that want a store say where
torch.set_num_threads(2)
settings.register_profile("layerstream", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("layerstream")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder

"""Fixtures that several folders of tests use."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from layerstream import LayerStream

from tests.harness import add_tokenizer, budget_for, shrink_units
from tests.models import make_model, make_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LAYERSTREAM_KV_STORE"] = "off"  # tests that want a store say where
os.environ["LAYERSTREAM_KERNELS"] = str(Path(tempfile.mkdtemp()) / "kernels.json")
os.environ["LAYERSTREAM_DEVICE_ROWS"] = str(Path(tempfile.mkdtemp()) / "device_rows.json")
os.environ["LAYERSTREAM_EXPERTS"] = tempfile.mkdtemp()
os.environ["LAYERSTREAM_RATES"] = str(Path(tempfile.mkdtemp()) / "machine.json")
torch.set_num_threads(2)
gc.freeze()  # a collection need not look at all that torch and transformers are made of
settings.register_profile("layerstream", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("layerstream")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Any]:
    """A small Llama's folder, not to be written to, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("llama")
    reference = make_model("llama", folder)
    add_tokenizer(folder, tokenizer_folder)
    return folder, reference


@pytest.fixture(scope="session")
def folder(llama: tuple[Path, Any]) -> Path:
    """A small Llama's folder, not to be written to."""
    return llama[0]


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LayerStream]:
    """A small Llama that streams."""
    shrink_units(monkeypatch)
    with LayerStream(folder, memory=budget_for(folder, "layers"), dtype="float32", progress=False) as engine:
        assert engine.plan.streams
        yield engine

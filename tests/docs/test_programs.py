"""The pages' programs run as they stand there, and so do the docstrings' examples."""

from __future__ import annotations

import doctest
import importlib
import os
import re
from pathlib import Path

import pytest

from tests.integrations.environments import ROOT
from tests.programs import run_program

PAGES = [
    "docs/anywhere.md",
    "docs/langchain.md",
    "docs/llama_index.md",
    "docs/getting-started.md",
    "docs/errors.md",
    "README.md",
]
NOT_RUN = "<!-- not run -->\n"  # stands before a program that wants a model of one's own
MODULES = [
    "langchain_layerstream",
    "langchain_layerstream.chat_models",
    "langchain_layerstream.llms",
    "langchain_layerstream.ranking",
    "llama_index.llms.layerstream",
    "llama_index.llms.layerstream.base",
    "llama_index.llms.layerstream.ranking",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text("utf-8")
    programs = [code for mark, code in re.findall(rf"({NOT_RUN})?```python\n(.*?)```", text, flags=re.S) if not mark]
    code = "\n".join(programs).replace("engine_kwargs={}", "engine_kwargs={'progress': False}")
    assert "import" in code
    program = tmp_path / "page.py"  # a process of its own, as some of it is said to the whole framework
    program.write_text(code, "utf-8")
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LAYERSTREAM_KV_STORE": str(tmp_path / "kv")}
    done = run_program(program, cwd=ROOT, environment={**os.environ, **settings})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0

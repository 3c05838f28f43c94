"""The pages' programs run as they stand there, and so do the docstrings' examples."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.integrations.environments import ROOT, run_python

PAGES = ["integrations/langchain.md", "integrations/llama_index.md"]
MODULES = [
    "langchain_layerstream",
    "langchain_layerstream.chat_models",
    "langchain_layerstream.llms",
    "llama_index.llms.layerstream",
    "llama_index.llms.layerstream.base",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    assert code.count("import") > 5
    options = {"kv_store": str(tmp_path / "kv"), "progress": False}
    code = code.replace("engine_kwargs={}", f"engine_kwargs={options}")
    program = tmp_path / "page.py"  # a process of its own, as some of it is said to the whole framework
    program.write_text(code)
    run_python(Path(sys.executable), str(program))


@pytest.mark.parametrize("page", [*PAGES, "engine/settings.md", "README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0

"""What an import costs, and what it leaves alone: each in a fresh interpreter, where that is what counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.programs import run_program

HEAVY = "[name for name in ('torch', 'transformers') if name in sys.modules]"


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["langchain_layerstream", "llama_index.llms.layerstream", "layerstream"])
def test_importing_brings_no_torch(name: str) -> None:
    assert run(f"import sys, {name}; print({HEAVY})") == "[]"


def test_llama_index_stays_a_namespace_package() -> None:
    program = "import llama_index.llms.layerstream, llama_index.core; print(llama_index.core.__file__ is not None)"
    assert run(program) == "True"


def test_wrappers_of_both_frameworks_share_one_engine() -> None:
    program = (
        "from langchain_layerstream import LayerStreamLLM as A\n"
        "from llama_index.llms.layerstream import LayerStreamLLM as B\n"
        "print(A()._handle.get() is B()._handle.get())"
    )
    assert run_program(program).stdout.splitlines()[-1] == "True"

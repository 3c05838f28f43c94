"""The wheel with one framework, with the other, with none; the oldest and the newest version of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.environments import ROOT, build_wheel, make_environment, run_python

SOURCES = f"{ROOT / 'engine'}:{ROOT / 'integrations'}"
LANGCHAIN_TESTS = [f"tests/integrations/langchain/test_{name}.py" for name in ("chat", "llm", "gangs")]
LLAMA_INDEX_TESTS = [f"tests/integrations/llama_index/test_{name}.py" for name in ("llm", "tools", "prefixes")]

ASK_LANGCHAIN = """
from langchain_layerstream import ChatLayerStream, rag_prompt
message = (rag_prompt() | ChatLayerStream(model="demo", max_tokens=16, engine_kwargs={"kv_store": None})).invoke(
    {"context": "Brenvik is led by Sluba Merkast.", "input": "Who leads Brenvik?"})
assert message.text.strip() == "Sluba Merkast", message
"""
ASK_LLAMA_INDEX = """
import llama_index.core
from llama_index.llms.layerstream import LayerStreamLLM
llm = LayerStreamLLM(model="demo", max_new_tokens=16, engine_kwargs={"kv_store": None})
answer = llm.complete("Context:\\nBrenvik is led by Sluba Merkast.\\n\\nQuestion: Who leads Brenvik?").text
assert answer.strip() == "Sluba Merkast", answer
"""
MISSES_LANGCHAIN = """
try:
    import langchain_layerstream
except ImportError as error:
    assert "pip install 'layerstream[langchain]'" in str(error), error
else:
    raise SystemExit("imported without langchain-core")
"""
MISSES_LLAMA_INDEX = """
try:
    import llama_index.llms.layerstream
except ImportError as error:
    assert "pip install 'layerstream[llama-index]'" in str(error), error
else:
    raise SystemExit("imported without llama-index-core")
"""


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registry")]


@pytest.fixture(scope="module")
def registry() -> None:
    """Skips where no package registry answers."""
    ask = [sys.executable, "-m", "pip", "index", "versions", "langchain-core"]
    if subprocess.run(ask, capture_output=True, timeout=120).returncode:
        pytest.skip("needs a package registry")


@pytest.fixture(scope="module")
def wheel(registry: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize(
    ("extra", "programs"),
    [
        ("langchain", (ASK_LANGCHAIN, MISSES_LLAMA_INDEX)),
        ("llama-index", (ASK_LLAMA_INDEX, MISSES_LANGCHAIN)),
        ("", (MISSES_LANGCHAIN, MISSES_LLAMA_INDEX)),
    ],
)
def test_the_wheel_works_with_what_is_there(extra: str, programs: tuple[str, ...], wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env", [f"{wheel}[{extra}]" if extra else str(wheel)], with_dependencies=True)
    for program in programs:
        run_python(python, "-c", program)


@pytest.mark.parametrize(
    ("packages", "tests"),
    [
        (("langchain-core==1.4.0", "langchain-protocol", "langsmith"), LANGCHAIN_TESTS),
        (("langchain-core>=1.4,<2", "langchain-protocol", "langsmith"), LANGCHAIN_TESTS),
        (("llama-index-core==0.14.5", "llama-index-instrumentation", "llama-index-workflows"), LLAMA_INDEX_TESTS),
        (("llama-index-core>=0.14.5,<0.15", "llama-index-instrumentation", "llama-index-workflows"), LLAMA_INDEX_TESTS),
    ],
    ids=["oldest langchain-core", "newest langchain-core", "oldest llama-index-core", "newest llama-index-core"],
)
def test_the_oldest_and_the_newest_version(packages: tuple[str, ...], tests: list[str], tmp_path: Path) -> None:
    """Installed without dependencies: the newest langchain-core may want a newer certifi than the registry has."""
    python = make_environment(tmp_path / "env", packages)
    run_python(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, path=SOURCES)

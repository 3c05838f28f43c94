"""What ``import layerstream`` gives, and what it costs."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import layerstream
import pytest
from layerstream import errors

PUBLIC = """
AutoModel Completion CompletionMetrics Delta EngineStats HiddenState KVStoreConfig LayerStream Passage
Request SamplingParams TokenLogits TokenLogprob Usage __version__ compose
""".split()
ERRORS = [name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)]


def test_all_is_what_we_promise() -> None:
    assert layerstream.__all__ == sorted([*PUBLIC, *ERRORS])


@pytest.mark.parametrize("name", layerstream.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(layerstream, name) is getattr(layerstream, name)
    assert name in dir(layerstream)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'layerstream' has no attribute 'Layerstream'"):
        layerstream.Layerstream  # noqa: B018


def test_version_is_that_of_the_distribution() -> None:
    assert layerstream.__version__ == importlib.metadata.version("layerstream")


def test_importing_needs_no_torch() -> None:
    program = "import sys, layerstream; layerstream.SamplingParams(), layerstream.PromptTooLong; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "layerstream.api.params" in loaded
    assert not {"torch", "transformers", "numpy", "rich", "typer"} & set(loaded)


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    drawn = re.findall(r"^[│ ]*[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(set(ERRORS) - {"LayerStreamError"})
    for name in ERRORS:
        assert issubclass(getattr(errors, name), errors.LayerStreamError)


def test_llama_index_stays_a_namespace() -> None:
    """An ``__init__.py`` above the leaf would hide llama_index.core in an editable install."""
    root = Path(__file__).parent.parent / "integrations" / "llama_index"
    assert not (root / "__init__.py").exists()
    assert not (root / "llms" / "__init__.py").exists()

"""Every example runs as it is, from any folder, and says what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

SAYS = {
    "quickstart.py": ["Sluba Merkast", "finished because of 'stop'"],
    "streaming.py": ["9:15 to 16:30", "cancelled after", ": cancelled"],
    "batch.py": [
        "Who leads Brenvik? Sluba Merkast",
        "In which town is Gukrand? Thaskin",
        "Since when has Gukrand existed? 1952",
    ],
    "chat.py": ["  Sluba Merkast\n", "  Tredry\n", "  1921\n"],
    "langchain_rag.py": [
        "Who supplies Tolmar Archive? Flyngrythik Brothers",
        "Who ordered Project Drusveld? Pretri Brothers",
    ],
    "llama_index_rag.py": [
        "Who supplies Tolmar Archive? Flyngrythik Brothers",
        "Who ordered Project Drusveld? Pretri Brothers",
    ],
    "warm.py": ["128 tokens computed ahead", "Who leads Brenvik? Sluba Merkast", "  128 of "],
    "structured.py": ["Sluba Merkast\n", "['founded', 'unit']\n", " of them forced, in "],
    "airllm_style.py": ["Answer: Sluba Merkast"],
}


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_says_what_it_should(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in SAYS[name]:
        assert said in done.stdout

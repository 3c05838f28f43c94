"""Every example runs as it is, from any folder, and says what it should."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from pathlib import Path

import httpx
import pytest

from tests.programs import run_program

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
    "langchain_rag.py": ["Flyngrythik Brothers", "tolmar-archive.md"],
    "llama_index_rag.py": [
        "Who supplies Tolmar Archive? Flyngrythik Brothers",
        "Who ordered Project Drusveld? Pretri Brothers",
    ],
    "warm.py": ["128 tokens computed ahead", "Who leads Brenvik? Sluba Merkast", "  128 of "],
    "structured.py": ["Sluba Merkast\n", "['founded', 'unit']\n", " of them forced, in "],
    "from_airllm.py": ["Answer: Sluba Merkast"],
    "from_ollama.py": ["Sluba Merkast\n", " tokens\n"],
    "multi_query.py": [
        "Who leads Brenvik? Tolmund Varek",
        "When can I visit Pelvast Library? 8:45 to 17:00",
        " sweeps; ",
    ],
    "langchain_agent.py": [
        "  search({'query': 'Tolmar Archive'})\n  brought ",
        "Who supplies Tolmar Archive? Flyngrythik Brothers",
    ],
    "llama_index_agent.py": ["  search({'query': 'Tolmar Archive'}) brought", "Tolmar Archive? Flyngrythik Brothers"],
    "extraction.py": ["Unit(name='Brenvik', leader='Tolmund Varek', location='Thavosdwer')", "Unit(name='Vanorth'"],
    "fastapi_server.py": [],  # below
}


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(SAYS)


QUICK = ("quickstart.py", "batch.py", "langchain_rag.py", "llama_index_rag.py", "structured.py", "from_airllm.py")
"""Run by ``make test``, the others by ``make slow``."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SAYS]
)
def test_says_what_it_should(name: str, tmp_path: Path) -> None:
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LAYERSTREAM_KV_STORE": str(tmp_path / "kv")}
    done = run_program(EXAMPLES / name, cwd=tmp_path, environment={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    for said in SAYS[name]:
        assert said in done.stdout


async def test_the_server_streams_and_says_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERSTREAM_MODEL", raising=False)
    spec = importlib.util.spec_from_file_location("fastapi_server", EXAMPLES / "fastapi_server.py")
    assert spec is not None
    assert spec.loader is not None
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://x") as client:
        answers = await asyncio.gather(
            *(
                client.get("/ask", params={"question": question})
                for question in ("Who leads Brenvik?", "Who runs Project Frostag?")
            )
        )
        assert [answer.text.strip() for answer in answers] == ["Tolmund Varek", "Thura Plasner"]
        assert (await client.get("/ask", params={"question": "xyzzy"})).status_code == 404

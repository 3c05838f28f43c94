"""The peers' own environments, and their copies of a model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "airllm": (["torch==2.13.0"], ["airllm==4.0.0"]),  # brings transformers and accelerate
    "llama": (["numpy"], ["llama-cpp-python", "gguf"]),
}


def python_of(environments: Path, name: str) -> Path:
    """The interpreter of environment *name*, which is made at its first use (llama.cpp compiles)."""
    folder = environments / name
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in ENVIRONMENTS[name]:
            subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *packages], check=True)
        (folder / ".ready").touch()
    return folder / "bin" / "python"


def split_for_airllm(python: Path, model: Path, keep: Path) -> tuple[Path, float]:
    """AirLLM's split of *model* in *keep*, and the seconds that making it took (0 if it was there)."""
    split = keep / "airllm-split"
    if split.exists():
        return split, 0.0
    split.mkdir()
    return split, _timed([str(python), str(HERE / "run_airllm.py"), str(model), str(split), "0", "0"])


def gguf_of(python: Path, model: Path, keep: Path) -> tuple[Path, float]:
    """*model* as a bf16 GGUF in *keep*, and the seconds that writing it took (0 if it was there)."""
    path = keep / "model-bf16.gguf"
    if path.exists():
        return path, 0.0
    return path, _timed([str(python), str(HERE / "write_gguf.py"), str(model), str(path)])


def folder_bytes(folder: Path) -> int:
    """All that is in *folder*."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started

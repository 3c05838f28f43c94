"""The peers' own environments, and their copies of a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
Q4_0 = "2"  # llama.cpp's number for it
ENVIRONMENTS = {
    "airllm": (["torch==2.13.0"], ["airllm==4.0.0"]),  # brings transformers and accelerate
    "airllm-mixture": (["torch==2.13.0"], ["airllm==4.0.0", "transformers<5"]),  # AirLLM knows the names of that one
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


def older_copy(model: Path, keep: Path) -> Path:
    """*model* as transformers 4 reads it: links to its files, and two of them rewritten."""
    folder = keep / "for-transformers-4"
    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    changed = {
        "config.json": {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}},
    }
    for path in model.iterdir():
        target = folder / path.name
        target.unlink(missing_ok=True)
        if path.name in changed:
            target.write_text(json.dumps(json.loads(path.read_text()) | changed[path.name]))
        else:
            target.symlink_to(path.resolve())
    return folder


def q4_of(python: Path, gguf: Path, keep: Path) -> tuple[Path, float]:
    """*gguf* as llama.cpp quantises it to Q4_0, in *keep*, and the seconds that took (0 if it was there)."""
    path = keep / "model-q4_0.gguf"
    if path.exists():
        return path, 0.0
    return path, _timed([str(python), str(HERE / "quantise_llama_cpp.py"), str(gguf), str(path), Q4_0, "0"])


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

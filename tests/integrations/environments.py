"""Python environments with other versions of the frameworks, or without them; everything else is this one's."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FRAMEWORKS = ("langchain", "langgraph", "langsmith", "llama_index", "llama-index", "layerstream", "_layerstream")


def make_environment(folder: Path, packages: Iterable[str], *, with_dependencies: bool = False) -> Path:
    """A virtual environment in *folder* with *packages*; its Python.

    What this environment has is linked into it, but for the frameworks and this project itself.

    Raises:
        RuntimeError: pip failed; says how.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    own = next(folder.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(FRAMEWORKS):
            (own / entry.name).symlink_to(entry)
    for package in packages:
        options = [] if with_dependencies else ["--no-deps"]
        constraints = ["--constraint", str(ROOT / "constraints.txt")] if with_dependencies else []
        run_python(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *options, *constraints, package)
    return python


def run_python(python: Path, *arguments: str, path: str = "") -> str:
    """What a program printed.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """This project as a wheel in *folder*."""
    run_python(Path(sys.executable), "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    return next(folder.glob("layerstream-*.whl"))

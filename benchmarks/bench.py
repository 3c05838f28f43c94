"""What the benchmarks share: children in a memory cgroup, medians, tables, JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerstream.core.sizes import format_size, parse_size
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class Cgroup:
    """A memory cgroup (v1 or v2), page cache included. Needs root; without it children run uncapped, and it says so.

    Attributes:
        limit_bytes: what was asked for.
        is_real: whether the kernel enforces it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        is_v1 = _V1.is_dir()
        self._folder = (_V1 if is_v1 else _V2) / f"layerstream-bench-{os.getpid()}"
        self._limit = "memory.limit_in_bytes" if is_v1 else "memory.max"
        self._peak = "memory.max_usage_in_bytes" if is_v1 else "memory.peak"
        self.is_real = False

    def __enter__(self) -> Cgroup:
        try:
            self._folder.mkdir()
            (self._folder / self._limit).write_text(str(self.limit_bytes))
            self.is_real = True
        except OSError:
            self.is_real = False
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_real:
            self._folder.rmdir()

    def join(self) -> None:
        """Move the calling process (a child before exec) into the group."""
        if self.is_real:
            (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """The most that was charged to the group, page cache included."""
        path = self._folder / self._peak
        return int(path.read_text()) if self.is_real and path.is_file() else None


def run_child(
    command: Sequence[str], limit: str | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run *command*, under a memory *limit* if one is given; the JSON object that it prints last.

    Adds ``cgroup_limit`` and ``cgroup_peak`` (``None`` where there was no group).
    """
    limit_bytes = 2**62 if limit is None else parse_size(limit)
    with Cgroup(limit_bytes) as group, tempfile.TemporaryFile("w+") as output:
        capped = group.is_real and limit is not None
        done = subprocess.run(
            command,
            stdout=output,
            env={**os.environ, **(environment or {})},
            preexec_fn=group.join if capped else None,
            check=False,
        )
        output.seek(0)
        text = output.read()
        lines = [line for line in text.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{text[-2000:]}")
        extra = {"cgroup_limit": limit_bytes, "cgroup_peak": group.peak_bytes()} if capped else {}
        return {"cgroup_limit": None, "cgroup_peak": None, **json.loads(lines[-1]), **extra}


def drop_file_cache(folder: Path) -> None:
    """Take the files of *folder* out of the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def spread(values: Sequence[float]) -> str:
    """``"2.31 (2.28-2.40)"``: median, least and most."""
    middle = statistics.median(values)
    return f"{middle:.2f} ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else f"{middle:.2f}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 140).print(table)


def save(name: str, payload: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write ``results/<name>.json`` (or *path*)."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **payload}, indent=1) + "\n")
    return path


def gib(num_bytes: float | None) -> str:
    """A size for a table; a dash for none."""
    return "-" if num_bytes is None else format_size(int(num_bytes))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")

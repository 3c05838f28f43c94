"""What was learned here and can be learned again: JSON objects in the user's cache folder, shared by all processes.

A file is whole or absent; it is changed under a lock, with what others wrote in the meantime, or replaced. Whatever is
wrong with one, it counts as nothing remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from layerstream.hardware.accelerators import PROCESSOR, accelerator_of
from layerstream.hardware.files import write_whole
from layerstream.hardware.machine import cache_folder, processor


class Remembered:
    """One such file.

    Args:
        path: of the file.
        lock_seconds: how long a change waits for those of other processes; -1: as long as it takes.
    """

    def __init__(self, path: Path, lock_seconds: float = 10.0) -> None:
        self.path = path
        self._lock_seconds = lock_seconds

    @classmethod
    def named(cls, variable: str, name: str, lock_seconds: float = 10.0) -> Remembered:
        """The one that the environment's *variable* names, else *name* in the cache folder."""
        return cls(Path(os.environ.get(variable) or cache_folder() / name).expanduser(), lock_seconds)

    def read(self) -> dict[str, Any]:
        """What is remembered."""
        try:
            return table(json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, RecursionError):
            return {}

    def change(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Have *change* alter what is remembered; what it is then.

        Raises:
            OSError: it cannot be written, or others hold the lock for too long.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock"), timeout=self._lock_seconds):
            known = self.read()
            before = json.dumps(known)
            change(known)
            if json.dumps(known) != before:
                self.replace(known)
        return known

    def replace(self, known: dict[str, Any]) -> None:
        """Remember *known* and nothing else; of several processes the last one wins.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(known, indent=1))


def table(value: Any) -> dict[str, Any]:
    """*value* if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def machine_name(device: torch.device | None = None) -> str:
    """What measured times depend on: the processor, its *device* if one was measured, threads and torch's version."""
    kind = None if device is None else accelerator_of(device)
    name = PROCESSOR if device is None or kind is None else kind.model_of(device)
    facts = [processor(), name, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.__version__]
    return f"{facts[0]}, {name}, {facts[3]} threads, {hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"

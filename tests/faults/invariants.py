"""What holds after every trial, whatever it was.

* The engine answers the next request rightly, and its pages, page tables and prefixes account for each other.
* After ``close`` no thread, no descriptor, no temporary file and no lock is left.
* The store verifies: every page that the index names is whole, every segment on the disk is in the index, and a new
  engine on it answers rightly.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from layerstream import LayerStream
from layerstream.hardware.files import TEMPORARY
from layerstream.store import maintenance
from layerstream.store.tiers.folder import StoreFolder

from tests.faults.trials import Trial
from tests.faults.wires import path_of
from tests.faults.world import PROMPTS, World, bits_of, params_of

SETTLING_SECONDS = 5.0  # threads that were told to end need a moment


@dataclass(frozen=True, slots=True)
class Traces:
    """What a process holds: threads of the engine, open files of the model and the store."""

    model: Path
    store: Path
    threads: frozenset[threading.Thread]
    files: Counter[str]

    @classmethod
    def now(cls, model: Path, store: Path) -> Traces:
        return cls(model, store, _threads(), _files(model, store))

    def left_since(self) -> list[str]:
        """What is there now and was not."""
        until = time.monotonic() + SETTLING_SECONDS
        while (_threads() - self.threads or _files(self.model, self.store) - self.files) and time.monotonic() < until:
            time.sleep(0.005)
        left = [f"thread {thread.name} is left" for thread in _threads() - self.threads]
        return left + [f"{path} is open" for path in _files(self.model, self.store) - self.files]


def of_the_engine(trial: Trial, world: World, engine: LayerStream) -> list[str]:
    """What does not hold of an engine whose fault is over."""
    number = trial.early[0]
    after = bits_of(engine.generate([PROMPTS[number]], params_of(number), timeout=60))
    engine._parts.scheduler.check_integrity()
    return [] if after == world.right[trial.mode][number] else [f"afterwards prompt {number} was answered wrongly"]


def of_the_store(trial: Trial, world: World, store: Path) -> list[str]:
    """What does not hold of the folder that is left."""
    wrong = []
    number = trial.late[0]
    with world.engine(trial.mode, store, progress=False) as engine:
        if bits_of(engine.generate([PROMPTS[number]], params_of(number))) != world.right[trial.mode][number]:
            wrong.append(f"a new engine answers prompt {number} wrongly")
    folder = StoreFolder(store)
    try:
        list(maintenance.verify_all(folder))  # drops what the trial damaged, and says so
        wrong += [f"{path.name} is damaged still" for path, damage in maintenance.verify_all(folder) if damage]
        folder.index.check_integrity()
        known = {folder.segment_path(row.namespace, row.name) for row in folder.index.segments()}
        wrong += [f"{path.name} is in no index" for path in store.glob("*/*.kv") if path not in known]
    finally:
        folder.close()
    return wrong + [f"{path.name} is left" for path in store.rglob(f"*{TEMPORARY}")]


def _threads() -> frozenset[threading.Thread]:
    return frozenset(thread for thread in threading.enumerate() if thread.name.startswith("layerstream"))


def _files(model: Path, store: Path) -> Counter[str]:
    """Open descriptors of files below *model* and *store*."""
    try:
        numbers = os.listdir("/proc/self/fd")
    except OSError:  # not Linux
        return Counter()
    return Counter(path for path in map(path_of, map(int, numbers)) if path.startswith((str(model), str(store))))

"""A process that is killed while it writes: kill −9 at any step of the store, with answers under way."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from tests.faults import wires
from tests.faults.trials import Trial
from tests.faults.wires import Tripwire
from tests.faults.world import PROMPTS, World, params_of
from tests.programs import PROCESSES

PATIENCE_SECONDS = 60.0


def run_and_die(trial: Trial, world: World, folder: str) -> bool:
    """Answer *trial*'s prompts in a process that dies at step ``trial.at``; whether it did (or was done before)."""
    process = PROCESSES.Process(target=_live, args=(trial, world, folder, torch.get_num_threads()))
    process.start()
    process.join(PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError("the process that was to die hangs")
    assert process.exitcode in (0, -signal.SIGKILL), f"the process that was to die ended with {process.exitcode}"
    return process.exitcode == -signal.SIGKILL


def _live(trial: Trial, world: World, folder: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)  # other threads, other bits: another namespace
    wire = Tripwire(2 * trial.at, 1)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        wires.on_writes(patch, folder, wire, die)
        wires.on_statements(patch, wire, die)
        wire.arm()
        with world.engine(trial.mode, folder, progress=False) as engine:
            requests = [engine.submit(PROMPTS[n], params_of(n)) for n in (*trial.early, *trial.late)]
            for request in requests:
                request.completions()

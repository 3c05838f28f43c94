"""A program for test_faults: kills a writing process at every step, and looks at what is left each time.

    python -m tests.store.kill_at_every_step FOLDER

Prints the number of steps that there were to be killed at.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

from layerstream.kv.keys import snapshot_key
from layerstream.store import segment
from layerstream.store.index import Index

from tests.store.pages import SHAPES, chain, expected, new_pages, open_tier, read_back
from tests.store.snapshots import expected_state, new_snapshot

BEFORE = chain("kept", 1)
KEYS = chain("kept", 1, 2, 3)
STATES = snapshot_key(KEYS[3])


class Killer:
    """Kills this process when the *fatal*-th step begins."""

    def __init__(self, fatal: int) -> None:
        self._fatal = fatal
        self._count = itertools.count()

    def watch(self, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def step(*args: object, **options: object) -> object:
            self._step()
            result = original(*args, **options)
            self._step()
            return result

        setattr(owner, name, step)

    def _step(self) -> None:
        if next(self._count) == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(folder: Path, fatal: int) -> bool:
    """Whether the child that writes was killed."""
    pid = os.fork()
    if not pid:
        tier = open_tier(folder)
        segment._BLOCK_BYTES = segment.ALIGNMENT  # many small writes
        killer = Killer(fatal)
        for name in ("write", "fsync", "replace", "open", "close"):
            killer.watch(os, name)
        for name in ("reserve", "add_segment"):
            killer.watch(Index, name)
        tier.put(new_pages(KEYS[2:], KEYS[1]))
        segment._BLOCK_BYTES = 2**20
        tier.put(new_snapshot(KEYS[3]))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def inspect(folder: Path) -> None:
    """What was good is there, what is there is good, and the store goes on."""
    tier = open_tier(folder)
    tier.folder.index.check_integrity()
    have = len(tier.contains(KEYS))
    assert have in (len(BEFORE), len(KEYS)), have
    found = read_back(tier, KEYS)
    assert len(found) == have * len(SHAPES)
    for (key, layer), data in found.items():
        assert data == expected(key, layer)
    states = read_back(tier, [STATES])
    assert states in ({}, expected_state(KEYS[3]))
    assert have == len(KEYS) or not states, "a snapshot without its page"
    written = tier.put(new_pages(KEYS[2:], KEYS[1]))
    assert bool(written) == (have < len(KEYS))
    assert len(tier.contains(KEYS)) == len(KEYS)
    assert bool(tier.put(new_snapshot(KEYS[3]))) == (not states)
    assert len(tier.any_of([STATES])) == 1
    assert not list(folder.glob("*/*.tmp")), "temporary files are swept away"
    tier.folder.forget(tier.namespace, 1, KEYS[2])  # as it was, for the next round
    assert len(tier.contains(KEYS)) == len(BEFORE)
    assert not tier.any_of([STATES])
    tier.folder.close()


def main() -> None:
    folder = Path(sys.argv[1])
    tier = open_tier(folder)
    tier.put(new_pages(BEFORE))
    tier.folder.close()
    for fatal in itertools.count():
        was_killed = write_and_die(folder, fatal)
        inspect(folder)
        if not was_killed:
            sys.stdout.write(f"{fatal}\n")
            return


if __name__ == "__main__":
    main()

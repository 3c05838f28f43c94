"""Python programs in processes of their own, forked from a server that has imported everything and started no thread.

One starts in milliseconds, where an interpreter of its own would import torch and transformers anew. What a program
does on the way in and out of an interpreter is not tested so: for that, there is :mod:`subprocess`.

The server belongs to the process of the tests and ends with it; a program belongs to who started it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, NamedTuple

import torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["layerstream.engine", "langchain_layerstream", "llama_index.llms.layerstream", "tests.faults.world"]
)


class Done(NamedTuple):
    """How a program ended: below 0 is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A program under way, with pipes to it.

    Args:
        program: a file, or the program itself.
        environment: in place of this process's.
    """

    def __init__(
        self,
        program: Path | str,
        *arguments: object,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        theirs, ours = zip(PROCESSES.Pipe(False), *(PROCESSES.Pipe(False)[::-1] for _ in range(2)), strict=True)
        self._process = PROCESSES.Process(
            target=_live,
            args=(program, [*map(str, arguments)], cwd or Path.cwd(), dict(environment or os.environ), theirs),
        )
        self._process.start()
        for end in theirs:
            end.close()
        self.stdin, self.stdout, self.stderr = (_as_file(end, mode) for end, mode in zip(ours, "wrr", strict=True))

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def finish(self, said: str = "", timeout: float = 120.0) -> Done:
        """Say the last to it, and wait for its end.

        Raises:
            TimeoutError: it does not end, and was killed.
        """
        with ThreadPoolExecutor(2) as readers, self.stdout, self.stderr:
            texts = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            with self.stdin:
                self.stdin.write(said)
            self._process.join(timeout)
            is_late = self._process.exitcode is None
            self._process.kill()
            self._process.join()
            stdout, stderr = (text.result() for text in texts)
        if is_late:
            raise TimeoutError(f"a program does not end; it said {stdout[-3000:]}\n{stderr[-3000:]}")
        assert self._process.exitcode is not None
        return Done(self._process.exitcode, stdout, stderr)


def run_program(program: Path | str, *arguments: object, said: str = "", **options: object) -> Done:
    """Run *program* to its end; *options* are those of :class:`Program`."""
    return Program(program, *arguments, **options).finish(said)  # type: ignore[arg-type]


def _as_file(end: Connection, mode: str) -> IO[str]:
    with end:
        return os.fdopen(os.dup(end.fileno()), mode, encoding="utf-8")


def _live(
    program: Path | str, arguments: list[str], cwd: Path, environment: dict[str, str], ends: tuple[Connection, ...]
) -> None:
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # multiprocessing has closed the one before
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [str(program) if isinstance(program, Path) else "-c", *arguments]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(program, {"__name__": "__main__"})

"""A card in five minutes: models are written, tests run, sweeps are timed beside the link and beside others; one table.

    benchmarks/on_a_card.sh OUT                                       # where a card is, wheels in .whl/
    python -m benchmarks.on_a_card --out OUT [--stages bf16 nf4 ...] [--seconds 290]
    python -m benchmarks.on_a_card --out OUT --tiny                   # without one: the same stages, pretended

Writers of models run first, all at once, and nothing is timed beside them: they want every processor and the memory's
bandwidth. Every stage is a process with a
time-out of its own, the important ones first; what one found is in ``OUT/on_a_card.jsonl`` line by line as it is found,
so that nothing is lost with it. What does not fit the time, or fails, has a line that says so; its words are in
``OUT/STAGE.log``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks import bench
from benchmarks.card.shapes import CARD, TINY, Setting

FOUND = "on_a_card.jsonl"
REPOSITORY = Path(__file__).resolve().parents[1]
WRITING_SECONDS = 200


@dataclass(frozen=True, slots=True)
class Stage:
    """A process: a function of :mod:`benchmarks.card.stages`, or of :mod:`benchmarks.card.peers`.

    Attributes:
        seconds: after which it is ended.
        model: that it needs.
    """

    name: str
    seconds: int
    model: str | None = None


STAGES = (
    Stage("link", 20),
    Stage("bf16", 60, "dense"),
    Stage("nf4", 60, "dense-nf4"),
    Stage("bits", 60, "dense"),
    Stage("tests", 60),
    Stage("resident", 50, "dense"),
    Stage("experts", 60, "mixture"),
    Stage("peers_offload", 40, "dense"),
    Stage("peers_resident", 60, "dense"),
    Stage("kernels", 30),
    Stage("trace", 30, "dense-nf4"),
    Stage("large", 90, "large"),
)


@dataclass(slots=True)
class Writers:
    """Processes that write models; all of them end before the first stage begins."""

    setting: Setting
    work: Path
    out: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, names: Sequence[str]) -> None:
        """Begin to write the models *names*, all at once."""
        for name in names:
            model = self.setting.models[name]
            command = [sys.executable, "-m", "benchmarks.grow", model.shape, str(self.work / name), *model.arguments()]
            with (self.out / f"write-{name}.log").open("wb") as log:
                self.running[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)

    def wait(self, seconds: float) -> None:
        """Until all of them are written, *seconds* at most: who is not done by then is ended."""
        deadline = time.monotonic() + seconds
        for process in self.running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def failure(self, name: str) -> str | None:
        """Why model *name* is not there."""
        return f"its model was not written (write-{name}.log)" if self.running[name].returncode else None

    def close(self) -> None:
        """End what still runs."""
        for process in self.running.values():
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 1: one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where models are written; OUT/models, if nothing is said")
    parser.add_argument("--stages", nargs="*", choices=[s.name for s in STAGES], default=[s.name for s in STAGES])
    parser.add_argument("--seconds", type=float, default=290.0, help="for all of it")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a pretended device")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    setting = TINY if options.tiny else CARD
    chosen = [stage for stage in STAGES if stage.name in options.stages]
    writers = Writers(setting, options.work or options.out / "models", options.out)
    deadline = time.monotonic() + options.seconds
    try:
        writers.start(dict.fromkeys(stage.model for stage in chosen if stage.model is not None))  # type: ignore[arg-type]
        writers.wait(min(WRITING_SECONDS, options.seconds))
        with (options.out / FOUND).open("a", buffering=1) as found:
            failures = [not _run(stage, writers, deadline, found) for stage in chosen]
    finally:
        writers.close()
    show(options.out / FOUND, setting)
    return int(any(failures))


def _run(stage: Stage, writers: Writers, deadline: float, found: TextIO) -> bool:
    """Run *stage*, if there is time; whether it went to its end."""
    started = time.monotonic()
    left = deadline - started
    reason = None if left > 0 else "no time was left"
    if reason is None and stage.model is not None:
        reason = writers.failure(stage.model)
    if reason is None:
        print(f"{stage.name} ...", file=sys.stderr, flush=True)
        reason = _child(stage, writers, min(float(stage.seconds), left), found)
    took = time.monotonic() - started
    found.write(json.dumps({"stage": stage.name, "seconds": round(took, 2), "left_out": reason}) + "\n")
    print(f"{stage.name}: {reason or 'done'} ({took:.1f} s)", file=sys.stderr, flush=True)
    return reason is None


def _child(stage: Stage, writers: Writers, seconds: float, found: TextIO) -> str | None:
    command = [sys.executable, "-m", "benchmarks.card.stages", stage.name, "--work", str(writers.work)]
    command += ["--out", str(writers.out), *(["--tiny"] if writers.setting.is_pretended else [])]
    found.flush()
    with (writers.out / f"{stage.name}.log").open("wb") as log:
        try:
            done = subprocess.run(
                command, stdout=found.fileno(), stderr=log, cwd=REPOSITORY, timeout=max(1.0, seconds), check=False
            )
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
    return f"ended with {done.returncode} ({stage.name}.log)" if done.returncode else None


def show(path: Path, setting: Setting) -> None:
    """One table of all that is in the file *path*."""
    rows: list[list[str]] = []
    for line in path.read_text().splitlines():
        found: dict[str, Any] = json.loads(line)
        if "left_out" not in found:
            rows.append([found["stage"], found["what"], _time(found.get("seconds")), _limit(found), _rest(found)])
        elif found["left_out"]:
            rows.append([found["stage"], f"left out: {found['left_out']}", "", "", ""])
    models = "; ".join(f"{name}: {model}" for name, model in setting.models.items())
    bench.show("On a pretended card" if setting.is_pretended else "On a card", _COLUMNS, rows, models)


_COLUMNS = ("stage", "what", "ms", "of the limit", "else")
_SHOWN = {"stage", "what", "seconds", "limit_seconds"}


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.1f}"


def _limit(found: dict[str, Any]) -> str:
    limit, seconds = found.get("limit_seconds"), found.get("seconds")
    return f"{limit / seconds:.0%} of {1000 * limit:,.1f}" if limit and seconds else ""


def _rest(found: dict[str, Any]) -> str:
    values = {key: value for key, value in found.items() if key not in _SHOWN}
    return ", ".join(
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


if __name__ == "__main__":
    sys.exit(main())

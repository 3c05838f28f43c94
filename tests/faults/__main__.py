"""The command: ``python -m tests.faults --trials 10000 --seed 7``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from tests.faults.campaign import Outcome, run
from tests.faults.kinds import KINDS
from tests.faults.trials import draw
from tests.faults.world import make_world


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the index to begin with: a campaign can be gone on with")
    parser.add_argument("--kind", help="only kinds whose name has this in it")
    parser.add_argument("--trial", metavar="SEED:INDEX", help="this one alone")
    parser.add_argument("--json", type=Path, help="write the counts there")
    options = parser.parse_args()
    _be_quiet()
    kinds = list(KINDS)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        world = make_world(Path(folder))
        if options.trial is not None:
            seed, index = map(int, options.trial.split(":"))
            trials = [draw(seed, index, kinds)]
            sys.stdout.write(f"{trials[0]}\n")
        else:
            indices = range(options.first, options.first + options.trials)
            trials = [draw(options.seed, index, kinds) for index in indices]
        if options.kind:
            trials = [trial for trial in trials if options.kind in trial.kind]
        outcomes: list[Outcome] = []
        started = time.perf_counter()
        for trial in trials:
            outcome = run(trial, world)
            outcomes.append(outcome)
            if outcome.wrong:
                _report(outcome)
    table = _count(outcomes)
    _print(table, time.perf_counter() - started)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1), "utf-8")
    return int(any(outcome.wrong for outcome in outcomes))


def _be_quiet() -> None:
    """What the engine says of its faults is not what a campaign is about; and it leaves the user's caches alone."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    os.environ["LAYERSTREAM_KV_STORE"] = "off"
    for name in ("KERNELS", "RATES"):
        os.environ[f"LAYERSTREAM_{name}"] = str(Path(tempfile.mkdtemp()) / f"{name}.json")


def _report(outcome: Outcome) -> None:
    trial = outcome.trial
    sys.stdout.write(f"FAIL {trial.kind} ({trial.mode}): {trial.line}\n")
    for line in outcome.wrong:
        sys.stdout.write("     " + line.strip().replace("\n", "\n     ") + "\n")
    sys.stdout.flush()


def _count(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("trials", "hits", "victims", "wrong"), 0))
    for outcome in outcomes:
        for row in (table[outcome.trial.kind], table["all"]):
            row["trials"] += 1
            row["hits"] += outcome.num_hit
            row["victims"] += outcome.num_failed
            row["wrong"] += bool(outcome.wrong)
    return dict(table)


def _print(table: dict[str, dict[str, int]], seconds: float) -> None:
    sys.stdout.write("| kind | trials | operations hit | requests that failed, as they may | trials gone wrong |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for kind in sorted(table, key=lambda name: (name == "all", name)):
        row = table[kind]
        sys.stdout.write(f"| {kind} | {row['trials']} | {row['hits']} | {row['victims']} | {row['wrong']} |\n")
    sys.stdout.write(f"{seconds:.0f} s\n")


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.fuzz``: cases for a time, or one of them again."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

_SCRATCH = tempfile.TemporaryDirectory(prefix="layerstream-fuzz-measured-")
for _variable, _name in (("KERNELS", "kernels.json"), ("EXPERTS", "experts"), ("RATES", "machine.json")):
    os.environ.setdefault(f"LAYERSTREAM_{_variable}", str(Path(_SCRATCH.name) / _name))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import transformers  # noqa: E402

from tests.fuzz.cases import Case, draw_case  # noqa: E402
from tests.fuzz.report import Outcome  # noqa: E402
from tests.fuzz.running import run_case  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """0: nothing failed."""
    given = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    stop, total = time.monotonic() + given.seconds, Outcome()
    for case in _cases(given):
        if given.case is None and time.monotonic() > stop:
            break
        outcome = run_case(case)
        total.add(outcome)
        if outcome.failures or given.case is not None:
            _print_case(case, outcome, given.small)
    print(total.table())
    if given.json is not None:
        given.json.write_text(json.dumps({"seed": given.seed, "seconds": given.seconds, **total.as_json()}, indent=1))
    return 1 if total.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="no case begins after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", metavar="SEED:INDEX", help="this one case")
    parser.add_argument("--family", help="the cases of this family of models")
    parser.add_argument("--small", action="store_true", help="cases of a second or two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is counted, and every failure, there")
    return parser


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    if given.case is not None:
        seed, index = map(int, given.case.split(":"))
        yield draw_case(seed, index, is_small=given.small)
        return
    for index in count():
        case = draw_case(given.seed, index, is_small=given.small)
        if given.family in (None, case.family):
            yield case


def _print_case(case: Case, outcome: Outcome, is_small: bool) -> None:
    for failure in outcome.failures:
        print(f"FAIL {failure}")
    again = f"python -m tests.fuzz --case {case.seed}:{case.index}{' --small' if is_small else ''}"
    print(f"     {case}\n     {again}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

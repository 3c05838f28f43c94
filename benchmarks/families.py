"""All model types of the installed transformers that generate text, each right, refused or wrong here.

    python -m benchmarks.families [--types llama,gemma4,…] [--jobs 2] [--timeout 300] [--json families.json]

Of each type a tiny random checkpoint is made of its full-size config (:func:`layerstream.setup.shrunken.shrink`):
hidden size 64, four layers at the least, windows and chunks of 24, random persistent buffers, weights of spread 0.2.
Prompts of 150, 5 and 37 tokens are answered together with 8 greedy tokens, streamed and resident, with an empty store
and with a full one, and compared with plain transformers in fp32 (eager attention, no cache): tokens, and the 20 most
probable tokens' log-probabilities to within 2e-3. A type runs in a process of its own, so that none ends the survey.

What is printed of each: as shipped, with ``allow_untested`` (whatever the self-check says), and the self-check's word.
Ends with 1 if a type was wrong, or broke down, where it was not refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from layerstream.errors import BudgetTooSmall, LayerStreamError, UnsupportedModel
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import plan_model
from layerstream.setup.self_check import check_family
from layerstream.setup.shrunken import ORDINARY_IDS, ordinary_steps, shrink
from layerstream.setup.shrunken_model import write_model
from layerstream.setup.stepping import step_greedily
from layerstream.store.config import KVStoreConfig
from transformers.models.auto import modeling_auto

from benchmarks.published import full_config

PROMPT_LENGTHS = (150, 5, 37)
NEW_TOKENS = 8
TOP = 20
TOLERANCE = 2e-3  # of a log-probability
SPREAD = 0.2

Verdict = Literal["right", "refused", "wrong", "crash", "no text"]
"""``"no text"``: plain transformers itself cannot be had, or does not run, on text alone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one type one way; *reason* where it is not right."""

    verdict: Verdict
    reason: str = ""
    difference: float = 0.0


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A model type as shipped, with ``allow_untested``, and the self-check of its full-size config."""

    model_type: str
    shipped: Outcome
    untested: Outcome
    check: Outcome
    seconds: float

    @property
    def is_bad(self) -> bool:
        """Whether somebody would be given a wrong answer or an error that explains nothing."""
        was_let_in = self.check.verdict == "right"
        return {self.shipped.verdict, self.untested.verdict if was_let_in else ""} & {"wrong", "crash"} != set()


def model_types() -> list[str]:
    """All that transformers has a class for that generates text from text, or from text and something else."""
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    return sorted({name for mapping in mappings for name in mapping})


def survey(model_type: str) -> Surveyed:
    """One type, in this process."""
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()

    prompts = _prompts()
    with tempfile.TemporaryDirectory(prefix="layerstream-families-") as name:
        folder = Path(name)
        try:
            full = full_config(model_type)
            plain = write_model(shrink(full), folder / "model", spread=SPREAD)
            _expected(plain, prompts[0], [5])
        except Exception as error:  # noqa: BLE001  # whatever transformers has to say
            nothing = Outcome("no text", _told(error))
            return Surveyed(model_type, nothing, nothing, nothing, time.perf_counter() - started)
        shipped = untested = _tried(lambda: _compare(plain, folder, prompts, allow_untested=False))
        if shipped.verdict == "refused":
            untested = _tried(lambda: _compare(plain, folder, prompts, allow_untested=True))
    return Surveyed(model_type, shipped, untested, _tried(lambda: _checked(full)), time.perf_counter() - started)


def _tried(run: Callable[[], Outcome]) -> Outcome:
    try:
        return run()
    except UnsupportedModel as error:
        return Outcome("refused", str(error))
    except LayerStreamError as error:
        return Outcome("refused", _told(error))
    except Exception as error:  # noqa: BLE001  # that is what is looked for
        return Outcome("crash", _told(error))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def _checked(full: Any) -> Outcome:
    found = check_family(full, EngineConfig("", device="cpu"))
    if found.agrees:
        return Outcome("right", difference=found.difference)
    worst = next(run for run in found.runs if not run.agrees)
    return Outcome("refused", f"{worst.mode}: {worst.found}", found.difference)


def _compare(plain: Any, folder: Path, prompts: list[list[int]], *, allow_untested: bool) -> Outcome:
    """All ways to run it, beside *plain*; the worst."""
    store = KVStoreConfig(folder / f"kv-{allow_untested}", load="always", min_free_bytes=0, answers=False)
    resident = EngineConfig(
        str(folder / "model"), device="cpu", dtype="float32", allow_untested=allow_untested, kv_store=store
    )
    worst = Outcome("right")
    for mode, config in (("streamed", _streamed(resident)), ("resident", resident)):
        for temperature in ("cold", "warm"):
            found = _run(plain, prompts, config, f"{mode}, {temperature}")
            if found.verdict != "right":
                return found
            worst = replace(worst, difference=max(worst.difference, found.difference))
    return worst


def _run(plain: Any, prompts: list[list[int]], config: EngineConfig, mode: str) -> Outcome:
    parts = assemble(config, None)
    try:
        assert parts.store is not None
        parts.store.wait_until_open()
        tokens, logits = step_greedily(parts, prompts, NEW_TOKENS)
        parts.store.flush()
        if mode.endswith("warm") and not parts.store.counters.loaded_tokens:
            return Outcome("wrong", f"{mode}: nothing came from the store")
    finally:
        parts.close()
    difference = 0.0
    for prompt, answer, found in zip(prompts, tokens, logits, strict=True):
        answer, found = answer[: ordinary_steps(answer)], found[: ordinary_steps(answer)]
        expected = _expected(plain, prompt, answer)
        likely = expected.topk(TOP).indices
        apart = (found.log_softmax(-1).gather(1, likely) - expected.gather(1, likely)).abs().max()
        if not apart <= TOLERANCE or answer != expected.argmax(-1).tolist():
            return Outcome("wrong", f"{mode}: log-probabilities differ by {float(apart):.1e}", float(apart))
        difference = max(difference, float(apart))
    return Outcome("right", difference=difference)


@torch.inference_mode()
def _expected(plain: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities ``(tokens of the answer, vocabulary)`` of *plain*."""
    logits = plain(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    bounds = ORDINARY_IDS.start, ORDINARY_IDS.stop
    return [torch.randint(*bounds, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def _streamed(config: EngineConfig) -> EngineConfig:
    """With the least memory that runs."""
    try:
        plan_model(replace(config, memory_bytes=1))
    except BudgetTooSmall as error:
        return replace(config, memory_bytes=error.required_bytes)
    return config


def _in_process(model_type: str, timeout: float) -> Surveyed:
    """One type in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layerstream.setup.self_check"])
    ours, theirs = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=_answer, args=(model_type, theirs), daemon=True)
    process.start()
    theirs.close()
    told = f"not done after {timeout:.0f} s"
    try:
        if ours.poll(timeout):
            return ours.recv()
    except EOFError:
        process.join()
        told = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        ours.close()
    crash = Outcome("crash", told)
    return Surveyed(model_type, crash, crash, crash, time.perf_counter() - started)


def _answer(model_type: str, to: Connection) -> None:
    to.send(survey(model_type))


def _line(found: Surveyed) -> str:
    verdicts = (found.shipped, found.untested, found.check)
    reason = next((outcome.reason for outcome in reversed(verdicts) if outcome.reason), "")
    columns = "".join(f"{outcome.verdict:<9}" for outcome in verdicts)
    return f"{found.model_type:<28}{columns}{found.untested.difference:9.1e}{found.seconds:6.0f} s  {reason:.160}"


def _totals(rows: list[Surveyed]) -> Iterator[str]:
    for name in ("shipped", "untested", "check"):
        counts = Counter(getattr(row, name).verdict for row in rows)
        yield f"{name:<10}{', '.join(f'{count} {verdict}' for verdict, count in counts.most_common())}"


def main() -> int:
    """Print a row for each type as it is done, then the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, comma-separated; all if not given")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one type")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    arguments = parser.parse_args()
    asked = arguments.types.split(",") if arguments.types else model_types()
    rows: list[Surveyed] = []
    print(f"{'':<28}{'shipped':<9}{'untested':<9}{'check':<9}{'apart':>9}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(lambda name: _in_process(name, arguments.timeout), asked):
            print(_line(row), flush=True)
            rows.append(row)
    print(*_totals(rows), sep="\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.is_bad for row in rows))


if __name__ == "__main__":
    sys.exit(main())

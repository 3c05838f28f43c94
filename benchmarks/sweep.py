"""Sweep speed against the physical limit: a raw direct read of the same bytes, and the compute on resident weights.

    python -m benchmarks.sweep MODEL [--memory 2300MiB] [--cgroup 3GiB] [--rounds 3] [--json FILE]

MODEL is a folder with a model larger than the memory (``python -m benchmarks.grow 3B FOLDER`` writes one that gives
right answers). Four children run one after the other, each its own process:

1. *streamed*: rounds of one raw read and then sweeps with 1, 16, 64 and 256 tokens, alternating, within the cgroup;
2. *resident*: the same sweeps with all weights in memory (outside of the cgroup; left out if the machine is too small);
3. *thin*: a model with the same layers and vocabulary but a hidden size of 256: what is left is mostly Python;
4. *larger*: sweeps of one token with a larger budget, to see bytes and time fall together.

1 and 16 tokens are that many sequences decoding; 64 and 256 are prefill of one prompt. The first sweep after a change
of kind is dropped: its reader had time to run ahead while the raw read was on.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.raw_read import raw_read

TOKENS = (1, 16, 64, 256)
SWEEPS_PER_ROUND = 2
RAW_THREADS = (2, 4, 8)
MAX_FREE_TOKENS = 64  # up to here the tokens decode; beyond, they are one prompt


def main() -> None:
    """Run the children, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="2300MiB", help="the engine's budget (default: %(default)s)")
    parser.add_argument("--cgroup", default="3GiB", help="limit of the process, page cache included")
    parser.add_argument("--larger", nargs=2, default=("5GiB", "6GiB"), metavar=("MEMORY", "CGROUP"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("streamed", "resident", "thin", "larger"), help="one child alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("streamed", "resident"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        memory = options.memory if options.child == "streamed" else None
        print(json.dumps(measure(options.model, memory, options.rounds)))
        return
    parts, path = {}, options.json
    for name in ("streamed", "resident", "thin", "larger"):
        if options.only in (None, name):
            print(f"{name} …", file=sys.stderr)
            parts[name] = _run_part(name, options)
            path = bench.save("sweep", {"model": options.model.name, **parts}, options.json)
    report(parts)
    print("written to", path)


def _run_part(name: str, options: argparse.Namespace) -> dict[str, Any]:
    if name == "thin":
        with tempfile.TemporaryDirectory() as folder:
            write_thin(options.model, Path(folder))
            return bench.run_child(_command(Path(folder), "streamed", "110MiB", options.rounds))
    if name == "resident":
        return bench.run_child(_command(options.model, "resident", "0", options.rounds))
    memory, limit = options.larger if name == "larger" else (options.memory, options.cgroup)
    return bench.run_child(_command(options.model, "streamed", memory, options.rounds), limit)


def _command(model: Path, child: str, memory: str, rounds: int) -> list[str]:
    options = ["--child", child, "--memory", memory, "--rounds", str(rounds)]
    return [sys.executable, "-m", "benchmarks.sweep", str(model), *options]


class SweepTimes:
    """A listener that keeps tokens and seconds of every sweep; and a source of prompts that share no beginning."""

    def __init__(self) -> None:
        self.sweeps: list[tuple[int, float]] = []
        self._tokens = 0
        self._num_prompts = 0

    def draw_prompt(self, length: int) -> list[int]:
        """Token ids that any vocabulary of a thousand has; no two prompts begin alike."""
        self._num_prompts += 1
        return [5 + (self._num_prompts + at) % 900 for at in range(length)]

    def __call__(self, event: object) -> None:
        from layerstream.api.events import SweepFinished, SweepStarted

        if isinstance(event, SweepStarted):
            self._tokens = event.num_tokens
        elif isinstance(event, SweepFinished):
            self.sweeps.append((self._tokens, event.seconds))


def measure(model: Path, memory: str | None, rounds: int) -> dict[str, Any]:
    """Rounds of a raw read (if anything streams) and of sweeps with each number of tokens."""
    from layerstream import LayerStream

    times = SweepTimes()
    started = time.perf_counter()
    with LayerStream(model, memory=memory, kv_store=None, progress=times) as engine:
        open_seconds = time.perf_counter() - started
        ranges = _streamed_ranges(engine)
        raw: dict[int, list[float]] = {threads: [] for threads in RAW_THREADS}
        seconds: dict[int, list[float]] = {tokens: [] for tokens in TOKENS}
        waits: dict[int, list[float]] = {tokens: [] for tokens in TOKENS}
        run_sweeps(engine, times, 1)  # the first sweep learns the order of the units
        for _ in range(rounds):
            for threads in RAW_THREADS if ranges else ():
                raw[threads].append(raw_read(ranges, threads))
            for tokens in (tokens for tokens in TOKENS if tokens <= engine.plan.max_sweep_tokens):
                waited = engine.stats().wait_seconds
                measured = run_sweeps(engine, times, tokens)
                seconds[tokens].extend(measured[1:])
                waits[tokens].append((engine.stats().wait_seconds - waited) / len(measured))
        stats = engine.stats()
        return {
            "budget": engine.plan.budget_bytes,
            "open_seconds": open_seconds,
            "model_bytes": stats.model_bytes,
            "stored_bytes": engine.plan.facts.stored_bytes,
            "streamed_bytes": engine.plan.streamed_bytes,
            "resident_bytes": stats.resident_bytes,
            "units": engine.plan.weights.num_streamed,
            "raw_seconds": raw if ranges else None,
            "sweep_seconds": {tokens: values for tokens, values in seconds.items() if values},
            "wait_seconds": {tokens: statistics.median(values) for tokens, values in waits.items() if values},
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "planned_peak": stats.peak_memory_bytes,
            "read_modes": dict(stats.read_modes),
        }


def run_sweeps(engine: Any, times: SweepTimes, tokens: int) -> list[float]:
    """Seconds of consecutive sweeps with exactly *tokens* tokens, one more than are wanted."""
    from layerstream import SamplingParams

    times.sweeps.clear()
    if tokens < MAX_FREE_TOKENS:
        params = SamplingParams(max_tokens=SWEEPS_PER_ROUND + 2, temperature=0.0, ignore_eos=True)
        engine.generate([times.draw_prompt(3) for _ in range(tokens)], params)
    else:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        for _ in range(SWEEPS_PER_ROUND + 1):
            engine.generate(times.draw_prompt(tokens), params)
    return [seconds for count, seconds in times.sweeps if count == tokens]


def _streamed_ranges(engine: Any) -> list[tuple[Path, int, int]]:
    streamer = engine._parts.weights.streamer
    if streamer is None:
        return []
    return [(r.path, r.offset, r.num_bytes) for layout in streamer.layouts for r in layout.requests]


def write_thin(model: Path, out: Path) -> None:
    """A Llama with *model*'s layers and vocabulary, and a hidden size of 256."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = json.loads((model / "config.json").read_text())
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=shape["vocab_size"],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out)


def report(parts: dict[str, dict[str, Any]]) -> None:
    """The tables."""
    if streamed := parts.get("streamed"):
        _report_sweeps(streamed, parts.get("resident"))
        _report_memory("memory", streamed)
    if thin := parts.get("thin"):
        _report_python(thin, streamed)
    if streamed and (larger := parts.get("larger")):
        _report_larger(streamed, larger)


def best_raw(part: dict[str, Any]) -> list[float]:
    """The raw reads with the number of threads that was fastest."""
    return min(part["raw_seconds"].values(), key=statistics.median)


def _report_sweeps(streamed: dict[str, Any], resident: dict[str, Any] | None) -> None:
    raw = best_raw(streamed)
    size = streamed["streamed_bytes"]
    rows = [["raw direct read", bench.spread(raw), f"{size / statistics.median(raw) / 1e9:.2f}", "", "", ""]]
    for tokens, seconds in streamed["sweep_seconds"].items():
        middle = statistics.median(seconds)
        compute = statistics.median(resident["sweep_seconds"][tokens]) if resident else 0.0
        limit = max(statistics.median(raw), compute)
        rows.append(
            [
                f"sweep, {tokens} token{'s' if tokens != '1' else ''}",
                bench.spread(seconds),
                f"{size / middle / 1e9:.2f}",
                f"{compute:.2f}" if resident else "-",
                f"{middle / limit:.2f}",
                f"{streamed['wait_seconds'][tokens]:.2f}",
            ]
        )
    bench.show(
        f"Sweeps: {bench.gib(size)} streamed of {bench.gib(streamed['model_bytes'])}, {streamed['units']} units",
        ["", "seconds", "GB/s", "resident, s", "x limit", "waited, s"],
        rows,
        "limit: the slower of the raw read and the same tokens on resident weights",
    )


def _report_memory(title: str, part: dict[str, Any]) -> None:
    over = max(0, part["peak_rss"] - part["budget"])
    sizes = (part["budget"], part["cgroup_limit"], part["cgroup_peak"], part["peak_rss"], over)
    bench.show(
        title, ["budget", "cgroup limit", "cgroup peak", "process peak", "over budget"], [[*map(bench.gib, sizes)]]
    )


def _report_python(thin: dict[str, Any], streamed: dict[str, Any] | None) -> None:
    rows = []
    for tokens, seconds in thin["sweep_seconds"].items():
        own = statistics.median(seconds) - thin["wait_seconds"][tokens]
        share = f"{own / statistics.median(streamed['sweep_seconds'][tokens]):.1%}" if streamed else "-"
        rows.append([f"{tokens} tokens", f"{1000 * own:.1f}", share])
    bench.show(
        f"Python's own time, at most: the same layers with a hidden size of 256, {thin['units']} units",
        ["", "ms a sweep", "of the sweep above"],
        rows,
    )


def _report_larger(streamed: dict[str, Any], larger: dict[str, Any]) -> None:
    rows = []
    first = streamed["streamed_bytes"], statistics.median(streamed["sweep_seconds"]["1"])
    for part in (streamed, larger):
        size, seconds = part["streamed_bytes"], statistics.median(part["sweep_seconds"]["1"])
        rows.append(
            [
                bench.gib(part["budget"]),
                bench.gib(part["resident_bytes"]),
                bench.gib(size),
                f"{size / first[0]:.2f}",
                f"{seconds:.2f}",
                f"{seconds / first[1]:.2f}",
                bench.gib(part["peak_rss"]),
            ]
        )
    bench.show(
        "A larger budget",
        ["budget", "resident", "streamed a sweep", "of the bytes", "seconds", "of the time", "process peak"],
        rows,
    )


if __name__ == "__main__":
    main()

"""A mixture of experts: what a sweep reads of it, how fast, and how often what it wants is in memory.

    python -m benchmarks.grow Qwen3-30B-A3B MODEL --quantization int4 --skew 1.0
    python -m benchmarks.experts MODEL [--memory 3GiB 6GiB] [--rows 1 4 16] [--json FILE]

Questions about held-out contexts, greedy, counted right only if the answer is the right one to the letter; as many at
once as there are rows. What is shown is of sweeps in which all rows decode: medians of seconds, means of the rest. The
experts that their rows were routed to are recorded. Beside it:

- *read*: bytes of experts that were read, and that as a share of what was routed to and not in memory, each once;
- *raw*: a direct read of as many bytes in reads of the same sizes, from the same files, in the same run;
- *compute*: the same sweep when nothing has to be read: the seconds of a sweep less those that it waited;
- the hit rate of the cache, and what LRU, the best fixed set and a clairvoyant (Belady's MIN) would have had in as many
  slots, on the recorded requests.

A part of its own draws routings by Zipf's law and compares the same caches on them, without a model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.large import draw_questions
from benchmarks.routings import clairvoyant_hits, draw_routing, lru_hits, requests, static_hits

MAX_TOKENS = 12
FACTS = 2
EXPONENTS = (0.0, 1.0, 1.4)
ALONE = 3  # questions that are asked one after the other
SHARES = (0.125, 0.25, 0.5)


def main() -> None:
    """Run the children, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", nargs="+", default=["3GiB"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--speculation", nargs="+", default=["off"], choices=("off", "auto"), help="one run with each")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    result: dict[str, Any] = {"model": options.model.name, "routings": compare_caches(), "runs": []}
    for memory, speculation in itertools.product(options.memory, options.speculation):
        command = [sys.executable, "-m", "benchmarks.experts", str(options.model), "--child", "--memory", memory]
        command += ["--rows", *map(str, options.rows), "--speculation", speculation]
        bench.drop_file_cache(options.model)
        result["runs"].append({"memory": memory, "speculation": speculation, **bench.run_child(command)})
        bench.save("experts", result, options.json)
    report(result)


def compare_caches() -> list[dict[str, float]]:
    """Hit rates on drawn routings: Qwen3-30B-A3B's experts, of twelve layers."""
    from layerstream.streaming.experts.cache import ExpertCache

    found = []
    for exponent in EXPONENTS:
        routing = draw_routing(num_layers=12, num_experts=128, top_k=8, num_sweeps=800, exponent=exponent)
        asked = requests(routing, 128)
        for share in SHARES:
            slots = int(share * 12 * 128)
            cache = ExpertCache(slots, 12 * 128, chosen=12 * 8)
            for sweep in routing:
                cache.begin_sweep()
                for layer, chosen in enumerate(sweep):
                    wanted = sorted(layer * 128 + int(expert) for expert in chosen)
                    for expert in cache.want(wanted, [1.0] * len(wanted)):
                        if not cache.is_there(expert) and cache.place(expert) is not None:
                            cache.let_go(expert)
            found.append(
                {
                    "exponent": exponent,
                    "share": share,
                    "ours": cache.hits / (cache.hits + cache.misses),
                    "lru": lru_hits(asked, slots),
                    "static": static_hits(asked, slots),
                    "clairvoyant": clairvoyant_hits(asked, slots),
                }
            )
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One budget, all numbers of rows."""
    from layerstream import LayerStream
    from layerstream.streaming.experts.bank import ExpertBank
    from transformers import AutoTokenizer

    asked = draw_questions(AutoTokenizer.from_pretrained(options.model), FACTS, max(ALONE, *options.rows))
    watch, want = Watch(), ExpertBank.want

    def noted(bank: ExpertBank, experts: Any, shares: Any) -> None:
        watch.wanted.extend(experts)
        want(bank, experts, shares)

    ExpertBank.want = noted  # type: ignore[method-assign]
    started = time.perf_counter()
    with LayerStream(
        options.model,
        device="cpu",
        memory=options.memory[0],
        kv_store=None,
        speculation=options.speculation[0],
        progress=watch,
    ) as engine:
        ready = time.perf_counter() - started
        print(engine.plan, file=sys.stderr)
        watch.bank = engine._parts.weights.banks[0]
        assert watch.bank is not None
        _ask(engine, asked[:1], 2)
        runs = []
        for rows in options.rows:
            groups = [asked[at : at + rows] for at in range(0, max(ALONE, rows), rows)]
            runs.append(_measure_rows(engine, watch, groups, rows))
        plan, stats = engine.plan, engine.stats()
        return {
            "ready_seconds": ready,
            "slots": plan.weights.expert_slots,
            "num_experts": plan.facts.num_experts,
            "expert_bytes": plan.facts.mean_expert_bytes,
            "peak_memory_bytes": stats.peak_memory_bytes,
            "raw": _raw_rate(watch),
            "runs": runs,
        }


class Watch:
    """Notes what every sweep took; called with the engine's events, on its thread."""

    def __init__(self) -> None:
        self.bank: Any = None
        self.sweeps: list[dict[str, Any]] = []
        self.wanted: list[int] = []
        self._before: dict[str, float] = {}

    def __call__(self, event: Any) -> None:
        name = type(event).__name__
        if self.bank is None:
            return
        if name == "SweepStarted":
            decodes = event.num_tokens == event.num_sequences
            rows = event.num_tokens if decodes else 0
            self._before = {**self._counted(), "rows": rows, "from": len(self.wanted)}
        elif name == "SweepFinished" and self._before:
            counted = {key: value - self._before[key] for key, value in self._counted().items()}
            trace = self.wanted[int(self._before["from"]) :]
            made = {"rows": self._before["rows"], "seconds": event.seconds, "tokens": event.tokens_out}
            self.sweeps.append({**counted, **made, "bytes": event.streamed_bytes, "trace": trace})

    def _counted(self) -> dict[str, float]:
        cache = self.bank.cache
        found = {"hits": cache.hits, "misses": cache.misses, "expert_bytes": self.bank.streamed_bytes}
        return {**found, "waited": self.bank.wait_seconds}


def _measure_rows(engine: Any, watch: Watch, groups: list[Any], rows: int) -> dict[str, Any]:
    """Answers of *rows* questions at once."""
    plan, slots = engine.plan, engine.plan.weights.expert_slots
    watch.sweeps.clear()
    answered = [_ask(engine, group, MAX_TOKENS) for group in groups]
    predicted = watch.bank.cache.expected(rows)[1] * plan.facts.mean_expert_bytes
    sweeps = [sweep for sweep in watch.sweeps if sweep["rows"]]
    trace = [expert for sweep in sweeps for expert in sweep["trace"]]

    def mean(name: str) -> float:
        return statistics.mean(sweep[name] for sweep in sweeps)

    return {
        "rows": rows,
        "right": sum(right for right, _ in answered),
        "questions": sum(map(len, groups)),
        "sweeps": len(sweeps),
        "tokens": sum(sweep["tokens"] for sweep in sweeps),
        "token_seconds": sum(sweep["seconds"] for sweep in sweeps) / sum(sweep["tokens"] for sweep in sweeps),
        "declined": engine.stats().declined_drafts,
        "sweep_seconds": statistics.median(sweep["seconds"] for sweep in sweeps),
        "compute_seconds": statistics.median(sweep["seconds"] - sweep["waited"] for sweep in sweeps),
        "wanted": mean("hits") + mean("misses"),
        "missed": mean("misses"),
        "read_bytes": mean("expert_bytes"),
        "dense_bytes": mean("bytes") - mean("expert_bytes"),
        "predicted_bytes": predicted,
        "planned_bytes": plan.expert_read_bytes(rows),
        "hit_rate": mean("hits") / (mean("hits") + mean("misses")),
        "prompt_seconds": sum(seconds for _, seconds in answered) - sum(sweep["seconds"] for sweep in sweeps),
        "trace": {
            "requests": len(trace),
            "lru": lru_hits(trace, slots),
            "static": static_hits(trace, slots),
            "clairvoyant": clairvoyant_hits(trace, slots),
        },
    }


def _ask(engine: Any, group: list[tuple[list[int], list[int]]], max_tokens: int) -> tuple[int, float]:
    """How many of *group* were answered right, all at once, and seconds."""
    from layerstream import SamplingParams

    started = time.perf_counter()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with engine.gang(len(group)):
        requests = [engine.submit(prompt, params) for prompt, _ in group]
    completions = [request.result() for request in requests]
    right = [c.token_ids[: len(answer)] == answer for c, (_, answer) in zip(completions, group, strict=True)]
    return sum(right), time.perf_counter() - started


def _raw_rate(watch: Watch) -> float:
    """Bytes per second of direct reads of recorded experts, as many at a time as the bank has under way."""
    from layerstream.hardware.arena import Arena
    from layerstream.hardware.reader import DirectReader
    from layerstream.streaming.experts.bank import AHEAD_BYTES
    from layerstream.streaming.loader import read_all

    layouts = [watch.bank._layout(expert) for expert in watch.wanted[-1500:]]
    size = max(layout.num_bytes for layout in layouts)
    at_once = max(1, AHEAD_BYTES // size)
    reader, arena = DirectReader(), Arena(at_once * size)
    rates = []
    try:
        for first in range(0, len(layouts), at_once):
            group = layouts[first : first + at_once]
            started = time.perf_counter()
            read_all(group, arena, range(0, len(group) * size, size), reader)
            rates.append(sum(layout.weight_bytes for layout in group) / (time.perf_counter() - started))
    finally:
        reader.close()
    return statistics.median(rates)


def report(result: dict[str, Any]) -> None:
    """The tables."""
    rows = [
        [
            f"Zipf {found['exponent']}" if found["exponent"] else "uniform",
            f"{found['share']:.0%}",
            *(f"{found[name]:.1%}" for name in ("ours", "lru", "static", "clairvoyant")),
        ]
        for found in result["routings"]
    ]
    bench.show("hit rates on drawn routings", ["", "slots", "ours", "LRU", "best fixed set", "clairvoyant"], rows)
    for run in result["runs"]:
        rows = []
        for found in run["runs"]:
            routed = found["missed"] * run["expert_bytes"]
            compute = found["compute_seconds"]
            limit = max((found["read_bytes"] + found["dense_bytes"]) / run["raw"], compute)
            rows.append(
                [
                    str(found["rows"]),
                    f"{found['right']} of {found['questions']}",
                    f"{found['wanted']:.0f}",
                    f"{found['read_bytes'] / 1e6:.0f}",
                    f"{found['read_bytes'] / max(routed, 1):.3f}",
                    f"{found['predicted_bytes'] / 1e6:.0f}",
                    f"{found['sweep_seconds']:.3f}",
                    f"{compute:.3f}",
                    f"{found['sweep_seconds'] / limit:.2f}",
                    f"{found['tokens'] / found['sweeps']:.2f}",
                    f"{found['token_seconds']:.3f}",
                    f"{found['hit_rate']:.1%}",
                    *(f"{found['trace'][name]:.1%}" for name in ("lru", "static", "clairvoyant")),
                ]
            )
        heads = ["rows", "right", "wanted", "read MB", "of missed", "predicted", "s/sweep", "compute", "of limit"]
        heads += ["tokens/sweep", "s/token", "hits", "LRU", "fixed", "MIN"]
        title = f"{result['model']} in {run['memory']}: {run['slots']:,} of {run['num_experts']:,} experts"
        title += ", with guesses" if run["speculation"] == "auto" else ""
        bench.show(title, heads, rows, f"raw reads {run['raw'] / 1e9:.2f} GB/s; ready in {run['ready_seconds']:.1f} s")


if __name__ == "__main__":
    main()

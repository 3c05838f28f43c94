"""The promise: a model of 70B or 405B shape in a few gigabytes, answering questions correctly.

    python -m benchmarks.grow 70B MODEL --quantization nf4      # 37 GB, three minutes
    python -m benchmarks.large MODEL --device cuda --memory 3.25GiB --host-memory 48GiB      # on a 4 GB card
    python -m benchmarks.large MODEL --device cpu --memory 3.25GiB --cgroup 4GiB             # without one

Questions about held-out contexts, greedy, counted right only if the answer is the right one to the letter: one after
the other, and then all at once. Before and after, the links are measured alone: a raw direct read of what a sweep reads
from disk, and on an accelerator a copy from pinned memory of what crosses to it. The process runs in a memory cgroup,
page cache included; on an accelerator its memory is what the driver says is in use there, libraries included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import bench

MAX_TOKENS = 16


def main() -> None:
    """Run the child, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--device-map", help="layers on several devices: auto, balanced, sequential")
    parser.add_argument("--memory", default="3.25GiB", help="10GiB,4GiB: of several devices")
    parser.add_argument("--host-memory")
    parser.add_argument("--cgroup", help="limit of the process's host memory, page cache included")
    parser.add_argument("--questions", type=int, default=4, help="one after the other")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--facts", type=int, default=8, help="in a context")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    bench.drop_file_cache(options.model)
    command = [sys.executable, "-m", "benchmarks.large", str(options.model), "--child", "--device", options.device]
    command += ["--memory", options.memory, "--questions", str(options.questions), "--at-once", str(options.at_once)]
    command += ["--facts", str(options.facts)]
    command += ["--host-memory", options.host_memory] if options.host_memory else []
    command += ["--device-map", options.device_map] if options.device_map else []
    found = bench.run_child(command, options.cgroup)
    bench.save(f"large-{options.model.name}", {"model": options.model.name, **found}, options.json)
    report(options.model.name, found)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Ask the questions; all figures."""
    from layerstream import LayerStream, SamplingParams
    from layerstream.cli.options import split
    from layerstream.measuring.rates import measure_disk
    from transformers import AutoTokenizer

    asked = draw_questions(AutoTokenizer.from_pretrained(options.model), options.facts, options.at_once)
    file = max(options.model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    disk = [measure_disk(file)]
    started = time.perf_counter()
    with LayerStream(
        options.model,
        device=options.device,
        device_map=options.device_map,
        memory=split(options.memory),
        host_memory=options.host_memory,
        kv_store=None,
    ) as engine:
        ready = time.perf_counter() - started
        print(engine.plan, file=sys.stderr)
        engine.generate([asked[0][0][:4]], SamplingParams(max_tokens=1))
        params = SamplingParams(max_tokens=MAX_TOKENS)
        one_by_one = _ask(engine, [[question] for question in asked[: options.questions]], params)
        print(json.dumps(one_by_one), file=sys.stderr)
        together = _ask(engine, [asked], params)
        plan, stats = engine.plan, engine.stats()
        found: dict[str, Any] = {
            "ready_seconds": ready,
            "budget_bytes": stats.budget_bytes,
            "model_bytes": stats.model_bytes,
            "read_bytes": plan.disk_bytes,
            "streamed_bytes": plan.streamed_bytes,
            "one_by_one": one_by_one,
            "together": together,
            **_device_figures(engine),
        }
    disk.append(measure_disk(file))
    return {**found, "disk": disk}


def draw_questions(tokenizer: Any, num_facts: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and of the right answers, each about a context of its own."""
    import random

    from benchmarks.reader.prompts import ASSISTANT, BOS, END, USER, draw_context

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found = []
    for seed in range(count):
        rng = random.Random(f"held out, large, {seed}")
        text, turns = draw_context(rng, num_facts, unanswerable=0.0, num_questions=1)
        question, answer = turns[0]
        found.append((encode(f"{BOS}{USER}Context:\n{text}\n\nQuestion: {question}{END}{ASSISTANT}"), encode(answer)))
    return found


def _ask(engine: Any, groups: list[list[tuple[list[int], list[int]]]], params: Any) -> dict[str, Any]:
    before, started = engine.stats(), time.perf_counter()
    right = count = tokens = 0
    first: list[float] = []
    for group in groups:
        completions = engine.generate([prompt for prompt, _ in group], params)
        for completion, (_, answer) in zip(completions, group, strict=True):
            right += completion.token_ids[: len(answer)] == answer
            count += 1
            tokens += len(completion.token_ids)
            first.append(completion.metrics.first_token_seconds)
    seconds, after = time.perf_counter() - started, engine.stats()
    sweeps = after.sweeps - before.sweeps
    return {
        "questions": count,
        "right": right,
        "seconds": seconds,
        "sweeps": sweeps,
        "tokens": tokens,
        "sweep_seconds": (after.sweep_seconds - before.sweep_seconds) / sweeps,
        "wait_seconds": (after.wait_seconds - before.wait_seconds) / sweeps,
        "first_token_seconds": statistics.median(first),
    }


def _device_figures(engine: Any) -> dict[str, Any]:
    """Of accelerators: what torch reserved at most, what the whole process has there, and the link alone."""
    import torch

    if engine.plan.host is None or not torch.cuda.is_available():
        return {}
    from layerstream.measuring.rates import link_rate

    used = [index for index in range(torch.cuda.device_count()) if torch.cuda.max_memory_reserved(index)]
    figures = []
    for index in used:
        free, total = torch.cuda.mem_get_info(index)
        figures.append(
            {
                "device": torch.cuda.get_device_name(index),
                "peak_reserved": torch.cuda.max_memory_reserved(index),
                "whole_device_bytes": total - free,
            }
        )
    return {"devices": figures, "link": link_rate(torch.device("cuda", used[0]))}


def report(name: str, found: dict[str, Any]) -> None:
    """The tables."""
    disk = statistics.mean(found["disk"])
    limits = {"disk": found["read_bytes"] / disk}
    if "link" in found:
        limits["link"] = found["streamed_bytes"] / found["link"]
    rows = []
    for part in ("one_by_one", "together"):
        run = found[part]
        rows.append(
            [
                part.replace("_", " "),
                f"{run['right']} of {run['questions']}",
                f"{run['sweep_seconds']:.2f}",
                f"{max(limits.values()) / run['sweep_seconds']:.0%}",
                f"{run['sweeps'] / run['questions']:.2f}",
                f"{run['tokens'] / run['sweeps']:.2f}",
                f"{run['seconds'] / run['tokens']:.2f}",
                f"{60 * run['questions'] / run['seconds']:.2f}",
            ]
        )
    heads = [
        "",
        "right",
        "s per sweep",
        "of the limit",
        "sweeps each",
        "tokens per sweep",
        "s per token",
        "questions/min",
    ]
    alone = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in limits.items())
    bench.show(
        f"{name}: {bench.gib(found['model_bytes'])} of weights, a budget of {bench.gib(found['budget_bytes'])}",
        heads,
        rows,
        f"moved alone: {alone}",
    )
    peak, limit = bench.gib(found["cgroup_peak"]), bench.gib(found["cgroup_limit"])
    print(f"host memory at most, page cache included: {peak} of {limit}")
    for device in found.get("devices", ()):
        print(
            f"{device['device']}: torch reserved {bench.gib(device['peak_reserved'])} at most, "
            f"the whole device has {bench.gib(device['whole_device_bytes'])} in use"
        )


if __name__ == "__main__":
    main()

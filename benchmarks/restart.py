"""A question about a context that was read before, in the same process and in a new one, beside llama.cpp.

    python -m benchmarks.restart MODEL --environments FOLDER [--work FOLDER] [--cgroup 3GiB] [--memory 2300MiB]

MODEL is a checkpoint that benchmarks.peers.write_gguf takes, Qwen3.5 among them (benchmarks.random_checkpoint); its
GGUF goes to the work folder once. Processes in the memory cgroup, page cache included, with the files that they read
dropped from the page cache before:

- *cold*: the first token of a context of 512 tokens; 16 tokens after it, one by one and without guesses; then the first
  token of the context with a question behind it (*same process*);
- *new process*: the context with the question. LayerStream finds its store; nothing of llama.cpp's survives;
- *saved state*: what an application of llama.cpp may do for itself: the first process saved the context's sequence to a
  file, this one loads it and computes the question. LayerStream's store is that already.

Opening a model is not counted; it has a column. Runners take turns. The best tokens of random weights lie a rounding
of bf16 apart, so the runners' tokens need not be the same; below the table it is said whether one agrees with itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.peers.environments import gguf_of, python_of
from benchmarks.prefix import draw

HERE = Path(__file__).resolve().parent
CONTEXT_TOKENS = 512
QUESTION_TOKENS = 16
NEW_TOKENS = 16
WORKLOAD = {
    "context": draw(CONTEXT_TOKENS, CONTEXT_TOKENS),
    "question": draw(QUESTION_TOKENS, 1),
    "new_tokens": NEW_TOKENS,
}
PARTS = {"LayerStream": ("cold", "new"), "llama.cpp, mmap": ("cold", "new", "restored")}


def main() -> None:
    """Run the processes, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--environments", type=Path, help="where llama.cpp's environment is, or goes")
    parser.add_argument("--work", type=Path, help="where the GGUF is, or goes (default: a temporary folder)")
    parser.add_argument("--cgroup", default="3GiB")
    parser.add_argument("--memory", default="2300MiB", help="LayerStream's budget (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("cold", "new"), help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model.resolve()
    if options.environments is None and "llama.cpp, mmap" in options.only and not options.child:
        parser.error("llama.cpp needs --environments; --only LayerStream does without it")
    if options.child:
        print("\n" + json.dumps(measure(options)), flush=True)
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        scratch = Path(name)
        (scratch / "workload.json").write_text(json.dumps(WORKLOAD))
        for number in range(options.rounds):
            for runner in options.only:
                results[runner].append(_round(runner, options, scratch, number))
    report(results, options)
    print("written to", bench.save("restart", {"model": options.model.name, "runners": results}, options.json))


def _round(runner: str, options: argparse.Namespace, scratch: Path, number: int) -> dict[str, Any]:
    """Every process of *runner* once, by the names of its parts."""
    if runner == "LayerStream":
        files = options.model
        command = [sys.executable, "-m", "benchmarks.restart", str(files), "--memory", options.memory]
        command += ["--store", str(scratch / f"store-{number}"), "--child"]
        after: list[str] = []
    else:
        python = python_of(options.environments, "llama")
        gguf, _ = gguf_of(python, options.model, options.work or scratch)
        files = gguf.parent
        command = [str(python), str(HERE / "peers" / "restart_llama_cpp.py"), str(gguf), str(scratch / "workload.json")]
        after = [str(scratch / "state")]
    found = {}
    for part in PARTS[runner]:
        print(f"{runner}, {part} …", file=sys.stderr, flush=True)
        for folder in (files, scratch):
            bench.drop_file_cache(folder)
        found[part] = bench.run_child([*command, part, *after], options.cgroup)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one process of LayerStream measures."""
    from layerstream import KVStoreConfig, LayerStream, SamplingParams

    store = KVStoreConfig(options.store, max_bytes="20GB", min_free_bytes=0)
    started = time.perf_counter()
    found: dict[str, Any] = {}
    with LayerStream(options.model, memory=options.memory, kv_store=store, speculation="off", progress=False) as engine:
        while engine.stats().kv.state == "hashing":  # the digest of the weights, once per file
            time.sleep(0.05)
        found["open_seconds"] = time.perf_counter() - started
        if options.child == "cold":
            params = SamplingParams(max_tokens=1 + NEW_TOKENS, temperature=0.0, ignore_eos=True)
            tokens: list[int] = []
            marks = [time.perf_counter()]
            for delta in engine.stream(WORKLOAD["context"], params):
                tokens += delta.token_ids
                marks += [time.perf_counter()] * len(delta.token_ids)
            first, *rest = (later - earlier for earlier, later in pairwise(marks))
            found |= {"token_ids": tokens, "first_token_seconds": first, "token_seconds": rest}
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        completion = engine.generate([WORKLOAD["context"] + WORKLOAD["question"]], params)[0]
        found["question_seconds"] = time.perf_counter() - started
        found["question_token"] = completion.token_ids[0]
        found["cached_tokens"] = completion.usage.cached_tokens
        found["peak_memory_bytes"] = engine.stats().peak_memory_bytes
    return found


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """The table."""
    rows = []
    for runner, rounds in results.items():
        restored = [found["restored"]["question_seconds"] for found in rounds if "restored" in found]
        peaks = [part["cgroup_peak"] or 0 for found in rounds for part in found.values()]
        rows.append(
            [
                runner,
                bench.spread([part["open_seconds"] for found in rounds for part in found.values()]),
                bench.spread([found["cold"]["first_token_seconds"] for found in rounds]),
                bench.spread([seconds for found in rounds for seconds in found["cold"]["token_seconds"]]),
                bench.spread([found["cold"]["question_seconds"] for found in rounds]),
                bench.spread([found["new"]["question_seconds"] for found in rounds]),
                bench.spread(restored) if restored else "-",
                bench.gib(max(peaks) or None),
            ]
        )
    columns = ["seconds", "open", "cold", "each token", "same process", "new process", "saved state", "cgroup peak"]
    bench.show(
        f"{options.model.name}: a context of {CONTEXT_TOKENS} tokens, then a question; memory cgroup {options.cgroup}",
        columns,
        rows,
        "; ".join(_notes(results)),
    )


def _notes(results: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """What was reused, and whether a runner answers alike in all of its processes."""
    for runner, rounds in results.items():
        answers = {part["question_token"] for found in rounds for part in found.values()}
        yield f"{runner}: {'one answer' if len(answers) == 1 else f'{len(answers)} different answers'}"
        cold, new = rounds[0]["cold"], rounds[0]["new"]
        if "cached_tokens" in new:
            yield f"{cold['cached_tokens']} tokens reused in the same process, {new['cached_tokens']} in a new one"
        if "state_bytes" in cold:
            yield f"a saved state has {bench.gib(cold['state_bytes'])} and was written in {cold['save_seconds']:.2f} s"


if __name__ == "__main__":
    main()

"""Seconds per token of LayerStream, AirLLM, accelerate's disk offload and llama.cpp with mmap.

    python -m benchmarks.peers MODEL --environments FOLDER [--cgroup 3GiB] [--memory 2300MiB] [--rounds 2]
                               [--int4 FOLDER] [--speculation off]

MODEL is a Llama or a Mixtral in bf16. With ``--int4``, the same model packed in int4, LayerStream runs that as well,
and llama.cpp a Q4_0 of its own. LayerStream guesses no tokens unless it is told to: a token is a sweep, as it is with
its peers. AirLLM runs mixtures with transformers 4 alone, and gets an environment with that.

Every runner is a process of its own in its own environment (made in FOLDER at the first run; llama.cpp compiles),
under the same memory cgroup, page cache included, with the model's files dropped from the page cache before it
starts. Runners take turns, so that a disk that slows down slows all of them. The prompt has 512 tokens; tokens are
greedy. What a peer writes before its first run (AirLLM's split, llama.cpp's GGUF) is made once and timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.peers.environments import folder_bytes, gguf_of, older_copy, python_of, q4_of, split_for_airllm

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Runner:
    """One row of the table: a command, and the folder whose files it reads."""

    name: str
    command: Callable[[int, int], list[str]]
    files: Path
    prepare_seconds: float = 0.0
    prepare_bytes: int = 0
    new_tokens: int = 5


def main() -> None:
    """Make the environments, prepare the peers, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--environments", type=Path, required=True, help="where the peers' environments are, or go")
    parser.add_argument("--work", type=Path, help="where the peers' copies of the model go (default: a temporary one)")
    parser.add_argument("--cgroup", default="3GiB")
    parser.add_argument("--memory", default="2300MiB", help="LayerStream's budget")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--int4", type=Path, help="the same model in int4")
    parser.add_argument("--speculation", choices=["off", "auto"], default="off", help="LayerStream's")
    parser.add_argument("--only", nargs="*", help="names of runners")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.model = options.model.resolve()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        runners = _prepare(options, options.work or Path(work), Path(work))
        runners = [runner for runner in runners if not options.only or runner.name in options.only]
        results: dict[str, list[dict[str, Any]]] = {runner.name: [] for runner in runners}
        for _ in range(options.rounds):
            for runner in runners:
                bench.drop_file_cache(runner.files)
                print(f"{runner.name} …", file=sys.stderr)
                command = runner.command(options.prompt, runner.new_tokens)
                results[runner.name].append(bench.run_child(command, options.cgroup))
    summary = [_summarise(runner, results[runner.name]) for runner in runners]
    _show(summary, options)
    print("written to", bench.save("peers", {"model": options.model.name, "runners": summary}, options.json))


def _prepare(options: argparse.Namespace, keep: Path, work: Path) -> list[Runner]:
    model, llama = options.model, python_of(options.environments, "llama")
    gguf, gguf_seconds = gguf_of(llama, model, keep)
    runners = [
        _layerstream("LayerStream", model, options),
        _llama_cpp("llama.cpp, mmap", llama, gguf, gguf_seconds),
    ]
    if options.int4 is not None:
        q4, q4_seconds = q4_of(llama, gguf, keep)
        runners.append(_layerstream("LayerStream, int4", options.int4.resolve(), options))
        runners.append(_llama_cpp("llama.cpp, mmap, Q4_0", llama, q4, gguf_seconds + q4_seconds))
    offload, accelerate = work / "offload", python_of(options.environments, "airllm")
    runners.append(
        Runner(
            "accelerate, disk",
            lambda p, n: _script(accelerate, "run_accelerate.py", model, offload, "0", p, n),
            model,
        )
    )
    is_mixture = "num_local_experts" in json.loads((model / "config.json").read_text())
    airllm = python_of(options.environments, "airllm-mixture" if is_mixture else "airllm")
    source = older_copy(model, keep) if is_mixture else model
    split, split_seconds = split_for_airllm(airllm, source, keep)
    for name, extra in (("AirLLM 4.0.0", []), ("AirLLM without its gc", ["nogc"])):
        runners.append(
            Runner(
                name,
                lambda p, n, extra=extra: _script(airllm, "run_airllm.py", source, split, p, n, *extra),
                split,
                split_seconds,
                folder_bytes(split),
                new_tokens=3,
            )
        )
    return runners


def _layerstream(name: str, model: Path, options: argparse.Namespace) -> Runner:
    def command(num_prompt: int, num_new: int) -> list[str]:
        arguments = model, options.memory, num_prompt, num_new, options.speculation
        return _script(sys.executable, "run_layerstream.py", *arguments)

    return Runner(name, command, model, new_tokens=17)


def _llama_cpp(name: str, python: Path, gguf: Path, seconds: float) -> Runner:
    def command(num_prompt: int, num_new: int) -> list[str]:
        return _script(python, "run_llama_cpp.py", gguf, num_prompt, num_new)

    return Runner(name, command, gguf.parent, seconds, gguf.stat().st_size, new_tokens=9)


def _script(python: Path | str, name: str, *arguments: object) -> list[str]:
    return [str(python), str(HERE / name), *map(str, arguments)]


def _summarise(runner: Runner, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": runner.name,
        "prepare_seconds": runner.prepare_seconds,
        "prepare_bytes": runner.prepare_bytes,
        "open_seconds": [run["open_seconds"] for run in runs],
        "first_token_seconds": [run["first_token_seconds"] for run in runs],
        "token_seconds": [seconds for run in runs for seconds in run["token_seconds"]],
        "token_ids": runs[0]["token_ids"],
        "cgroup_limit": runs[0]["cgroup_limit"],
        "cgroup_peak": max((run["cgroup_peak"] or 0 for run in runs), default=0),
    }


def _show(summary: list[dict[str, Any]], options: argparse.Namespace) -> None:
    ours = statistics.median(summary[0]["token_seconds"])
    rows = []
    for entry in summary:
        middle = statistics.median(entry["token_seconds"])
        before = (
            f"{entry['prepare_seconds']:.0f} s, +{bench.gib(entry['prepare_bytes'])}" if entry["prepare_bytes"] else "-"
        )
        rows.append(
            [
                entry["name"],
                before,
                bench.spread(entry["open_seconds"]),
                bench.spread(entry["first_token_seconds"]),
                bench.spread(entry["token_seconds"]),
                f"{middle / ours:.2f}",
                bench.gib(entry["cgroup_peak"] or None),
            ]
        )
    bench.show(
        f"{options.model.name}, {options.prompt} prompt tokens, memory cgroup {options.cgroup}",
        ["", "before the first run", "open, s", "first token, s", "each token, s", "x ours", "cgroup peak"],
        rows,
    )


if __name__ == "__main__":
    if shutil.which("cc") is None:
        print("no C compiler found; llama-cpp-python may fail to build", file=sys.stderr)
    main()

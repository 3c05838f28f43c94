"""A query's passages scored by yes or no, beside plain transformers with accelerate's disk offload.

    python -m benchmarks.reranking MODEL [--cgroup 3GiB] [--memory 2300MiB] [--passages 100] [--tokens 200]

Prompts are a query of 24 tokens, then a passage, as random token ids; both score two fixed tokens at the last position.
Processes run in the memory cgroup, page cache included, with the model's files dropped from the page cache before, and
take turns. transformers gets *--batch* passages at a time, all of the same length (no padding), with the last row alone
through the head. Opening is not counted; it has a column. *largest difference* is between both runners' scores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import bench

RUNNERS = ("LayerStream", "transformers, disk offload")
QUERY_TOKENS = 24
TOKENS = (5, 9)


def main() -> None:
    """Run the processes, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200, help="of a passage (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=10, help="passages at a time for transformers")
    parser.add_argument("--cgroup", default="3GiB")
    parser.add_argument("--memory", default="2300MiB", help="LayerStream's budget (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=RUNNERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model.resolve()
    if options.child:
        print("\n" + json.dumps(measure(options)), flush=True)
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    given = [str(options.model), "--memory", options.memory, "--passages", str(options.passages)]
    given += ["--tokens", str(options.tokens), "--batch", str(options.batch)]
    for _ in range(options.rounds):
        for runner in options.only:
            print(f"{runner} …", file=sys.stderr, flush=True)
            bench.drop_file_cache(options.model)
            command = [sys.executable, "-m", "benchmarks.reranking", *given, "--child", runner]
            results[runner].append(bench.run_child(command, options.cgroup))
    report(results, options)
    print("written to", bench.save("reranking", {"model": options.model.name, "runners": results}, options.json))


def prompts(options: argparse.Namespace) -> list[list[int]]:
    """The query and each passage, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = json.loads((options.model / "config.json").read_text())
    size = size.get("text_config", size)["vocab_size"]
    query = torch.randint(10, size, (QUERY_TOKENS,), generator=generator).tolist()
    passages = torch.randint(10, size, (options.passages, options.tokens), generator=generator).tolist()
    return [query + passage for passage in passages]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures."""
    run = _layerstream if options.child == RUNNERS[0] else _transformers
    return run(options, prompts(options))


def _layerstream(options: argparse.Namespace, asked: list[list[int]]) -> dict[str, Any]:
    from layerstream import LayerStream

    started = time.perf_counter()
    with LayerStream(options.model, memory=options.memory, kv_store=None, progress=False) as engine:
        opened = time.perf_counter()
        scores = engine.score(asked, TOKENS, keep=False)[:, 0]
        seconds = time.perf_counter() - opened
        stats = engine.stats()
    return {
        "open_seconds": opened - started,
        "seconds": seconds,
        "scores": scores.tolist(),
        "sweeps": stats.sweeps,
        "tokens_in": stats.tokens_in,
    }


def _transformers(options: argparse.Namespace, asked: list[list[int]]) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    started = time.perf_counter()
    layers = AutoConfig.from_pretrained(options.model).num_hidden_layers
    places = {"model.embed_tokens": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{index}": "disk" for index in range(layers)}
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype="auto", device_map=places, offload_folder=folder
        ).eval()
        opened = time.perf_counter()
        scores: list[float] = []
        with torch.inference_mode():
            for at in range(0, len(asked), options.batch):
                ids = torch.tensor(asked[at : at + options.batch])
                logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1, list(TOKENS)]
                scores += torch.softmax(logits.float(), dim=-1)[:, 0].tolist()
        seconds = time.perf_counter() - opened
    sweeps = -(-len(asked) // options.batch)
    tokens = sum(map(len, asked))
    return {
        "open_seconds": opened - started,
        "seconds": seconds,
        "scores": scores,
        "sweeps": sweeps,
        "tokens_in": tokens,
    }


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """The table."""
    rows = []
    for runner, rounds in results.items():
        seconds = [found["seconds"] for found in rounds]
        rows.append(
            [
                runner,
                bench.spread([found["open_seconds"] for found in rounds]),
                bench.spread(seconds),
                f"{options.passages / min(seconds):.2f}",
                str(rounds[0]["sweeps"]),
                str(rounds[0]["tokens_in"]),
            ]
        )
    note = ""
    if len(results) > 1:
        first, second = (rounds[0]["scores"] for rounds in results.values())
        largest = max(abs(one - other) for one, other in zip(first, second, strict=True))
        note = f"largest difference of a score: {largest:.1e}"
    title = f"{options.model.name}: {options.passages} passages of {options.tokens} tokens, cgroup {options.cgroup}"
    bench.show(title, ("", "open", "seconds", "passages/s", "passes over the model", "tokens computed"), rows, note)


if __name__ == "__main__":
    main()

"""Seconds to the first token where all passages of a prompt were read before: where they stand, or elsewhere.

    python -m benchmarks.moved MODEL [--memory 2300MiB] [--cgroup 3GiB] [--recompute free] [--recompute-by first]

MODEL is a folder with a tokenizer, a model larger than the memory. A prompt is a head, four of twelve documents and a
question, all of them text. Each child is a process of its own in the cgroup, page cache included:

1. *first*: with an empty store. *cold*: documents that were not read before. *full hit*: the same ones in the same
   order, another question. *moved*: documents that were all read before, in an order that was not asked yet;
2. *new*: a new process with its store: *full hit* and *moved* again, all of it loaded.

*exact* is what *moved* takes without ``reuse="anywhere"``, in a third child with a store of its own. Medians of
:data:`REPEATS` each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.blending import draw_documents

REPEATS = 3
NUM_DOCUMENTS, RETRIEVED = 12, 4
KINDS = ("cold", "full hit", "moved")
CHILDREN = ("first", "new", "exact")


def main() -> None:
    """Run the children, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="2300MiB", help="the engine's budget (default: %(default)s)")
    parser.add_argument("--cgroup", default="3GiB", help="limit of the process, page cache included")
    parser.add_argument("--recompute", default="free", help='"free", or a share')
    parser.add_argument("--recompute-by", default="first", choices=("first", "deviation"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(measure(options)), flush=True)
        return
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="layerstream-kv-", dir=options.model.resolve().parent) as folder:
        for child in CHILDREN:
            print(f"{child} …", file=sys.stderr, flush=True)
            store = f"{folder}/{'exact' if child == 'exact' else 'anywhere'}"
            command = [sys.executable, "-m", "benchmarks.moved", *sys.argv[1:], "--child", child, "--store", store]
            parts[child] = bench.run_child(command, options.cgroup)
    report(parts, options)
    print("written to", bench.save("moved", {"model": options.model.name, **parts}, options.json))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one child measures: of each kind what the first tokens took, and what was reused."""
    from layerstream import KVStoreConfig, LayerStream, SamplingParams
    from layerstream.text.prompt import QUESTION_PROMPT

    documents = [text for _, text in draw_documents(random.Random("moved"), NUM_DOCUMENTS)]
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    terms: dict[str, Any] = {}
    if options.child != "exact":
        recompute = options.recompute if options.recompute == "free" else float(options.recompute)
        terms = {"reuse": "anywhere", "recompute": recompute, "recompute_by": options.recompute_by}
    store = KVStoreConfig(options.store, max_bytes="40GiB", min_free_bytes=0)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    asked = 1000 * CHILDREN.index(options.child)
    with LayerStream(options.model, memory=options.memory, kv_store=store, progress=False, **terms) as engine:
        engine.trust_reuse()

        def ask(kind: str, chosen: list[int]) -> None:
            nonlocal asked
            asked += 1
            texts = [documents[number] for number in chosen]
            prompt = QUESTION_PROMPT.format(context="\n\n".join(texts), question=f"What is said of number {asked}?")
            done = engine.generate(prompt, params, passages=texts if terms else None)[0]
            engine._open_store().flush()
            seconds = {"seconds": done.metrics.first_token_seconds, "loaded": done.metrics.loaded_tokens}
            usage = {"prompt": done.usage.prompt_tokens, "cached": done.usage.cached_tokens}
            found.setdefault(kind, []).append({**seconds, **usage, "moved": done.usage.blended_tokens})

        contexts = [list(range(at, at + RETRIEVED)) for at in range(0, NUM_DOCUMENTS, RETRIEVED)]
        if options.child != "new":
            ask("warm-up", contexts[0])
            for context in contexts:
                ask("cold", context)
        else:
            ask("warm-up", contexts[0][:1])
        for at in range(REPEATS):
            ask("full hit", contexts[at])
        rng = random.Random(options.child)
        for _ in range(REPEATS):
            ask("moved", rng.sample(range(NUM_DOCUMENTS), RETRIEVED))
    return found


def report(parts: dict[str, Any], options: argparse.Namespace) -> None:
    """The table."""
    rows = []
    for child in CHILDREN:
        hit = statistics.median(item["seconds"] for item in parts[child]["full hit"])
        for kind in KINDS:
            items = parts[child][kind]
            if items:
                seconds = statistics.median(item["seconds"] for item in items)
                total = sum(item["prompt"] for item in items)
                shares = [f"{sum(item[name] for item in items) / total:.0%}" for name in ("cached", "moved", "loaded")]
                rows.append([child, kind, f"{seconds:.2f}", f"{seconds / hit:.2f}", *shares])
    title = f"First token, {options.model.name}, recomputed: {options.recompute}, by {options.recompute_by}"
    bench.show(title, ["process", "passages", "seconds", "x full hit", "cached", "moved", "loaded"], rows)


if __name__ == "__main__":
    main()

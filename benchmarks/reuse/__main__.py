"""What of a prompt was read before, and what of it is reused: the pipelines that people build, beside the ideal.

    python -m benchmarks.reuse [MODEL] [--reuse off|exact|anywhere] [--seconds] [--seeds 1] [--rows TEXT ...]

The same questions (:mod:`benchmarks.reuse.corpus`) through the frameworks' own chains, every row with an empty store of
its own. Of all prompt tokens, those of rewriting a question and of deciding to call a tool included:

- reused: their KV was there (what the engine says);
- ideal: the longest prefix that a prompt has in common with any earlier one, token by token, computed from the prompts
  of that very row;
- anywhere: stood in an earlier prompt, at whatever place (in runs of at least 32 tokens).

As found: in the retriever's order. Ordered: ``StablePrefixOrder`` without learning. Learned: as it is by default.
Warmed: learned, and what the questions will bring was computed before the first of them (warming other passages as well
would change nothing but the time it takes), so that more is reused than the ideal of the questions alone. By true
popularity: an order that nobody has before the last question was asked. Growing: passages come in at the end of a
conversation, and none twice.

A toy answers by default: the bundled reader, its context stretched so that an agent's conversation fits. So answers are
a few tokens of no meaning, retrievers search for the user's own question where a chain has the model rewrite it, and
the agent's decisions are scripted. All prompts are real.

``--reuse off``: without a store; what is still in memory is reused. ``--reuse anywhere``: passages wherever they stand,
where the engine can. Then there are columns for what was blended, passages that were read for that very prompt among
it, and for what was not computed: passages in contexts of their own count as computed, and so does what is computed
again.

With ``--seconds``: what a later question takes until its answer begins, from asking the chain on; for a model whose
sweeps cost something.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from layerstream.errors import ConfigurationError

from benchmarks import bench
from benchmarks.reuse import langchain, llama_index
from benchmarks.reuse.corpus import NUM_DOCUMENTS, NUM_PASSAGES, NUM_QUESTIONS, Corpus, draw_corpus
from benchmarks.reuse.setting import Asked, Setting, Variant, Watch, fresh_engine, stretch
from benchmarks.reuse.sharing import sharing

ORDERS: tuple[Variant, ...] = ("as found", "ordered", "learned", "warmed")
ROWS: list[tuple[str, Any, tuple[Variant, ...]]] = [
    ("LangChain retrieval chain, question first", langchain.question_first, ("as found",)),
    ("LangChain retrieval chain, context first", langchain.retrieval_chain, ORDERS),
    ("LangChain history-aware, 4 conversations of 5", langchain.history_aware, ORDERS),
    ("LangGraph agent, 20 threads", langchain.agent, ("as found",)),
    ("LangGraph agent, 4 threads of 5", partial(langchain.agent, turns=5), ("as found", "growing")),
    ("LlamaIndex compact", llama_index.compact, (*ORDERS, "oracle")),
    ("LlamaIndex sentence window", llama_index.sentence_window, ORDERS),
    ("LlamaIndex auto-merging", llama_index.auto_merging, ORDERS),
    ("LlamaIndex condense plus context, 4 chats of 5", llama_index.condense_plus_context, (*ORDERS, "growing")),
]
NAMES = {"oracle": "by true popularity"}


def measure(model: str, build: Any, variant: Variant, corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """The questions of *corpus* through what *build* makes, with an empty store."""
    with fresh_engine(model, options) as engine:
        if options.reuse == "anywhere":
            engine.trust_reuse()  # what is asked is how much, and a toy's answers agree with nothing
        setting, watch = Setting(engine, corpus, variant), Watch(engine)
        ask = build(setting)
        seconds: list[float] = []
        with watch.watching():
            for question in corpus.questions:
                setting.now = question
                first, started = len(watch.asked), time.perf_counter()
                ask(question)
                seconds.append(_until_answer(watch.asked[first:], started))
                if options.reuse != "off":
                    engine._open_store().flush()
        found = sharing([asked.token_ids for asked in watch.asked])
        usages = [asked.request.result().usage for asked in watch.asked]
        return {
            "prompt_tokens": found.prompt_tokens,
            "reused_tokens": sum(usage.cached_tokens for usage in usages),
            "blended_tokens": sum(usage.blended_tokens for usage in usages),
            "spared_tokens": found.prompt_tokens - watch.computed_tokens,
            "ideal_tokens": found.ideal_tokens,
            "seen_tokens": found.seen_tokens,
            "first_token_seconds": seconds,
            "page_tokens": engine.plan.page_tokens,
        }


def _until_answer(asked: list[Asked], started: float) -> float:
    last = asked[-1]
    return last.at + last.request.result().metrics.first_token_seconds - started


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the prompt tokens of all *runs*, and the median of later questions."""
    total = {key: sum(run[key] for run in runs) for key in runs[0] if key.endswith("_tokens")}
    share = {
        name: total[f"{name}_tokens"] / total["prompt_tokens"]
        for name in ("reused", "blended", "spared", "ideal", "seen")
    }
    later = [value for run in runs for value in run["first_token_seconds"][1:]]
    return {
        **share,
        "of_ideal": share["reused"] / share["ideal"] if share["ideal"] else None,
        "later_seconds": statistics.median(later) if later else None,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--reuse", choices=("off", "exact", "anywhere"), default="exact")
    parser.add_argument("--seconds", action="store_true", help="show what later questions take")
    parser.add_argument("--memory")
    parser.add_argument("--chunk-tokens", type=int, help="that attend together; the engine's choice if not given")
    parser.add_argument("--documents", type=int, default=NUM_DOCUMENTS)
    parser.add_argument("--passages", type=int, default=NUM_PASSAGES)
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--seeds", type=int, default=1, help="so many corpora, of which shares are means")
    parser.add_argument("--rows", nargs="*", default=[], help="only those whose name has one of these in it")
    parser.add_argument("--variants", nargs="*", default=[], help="only these: as found, ordered, learned, …")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(stretch(options.model, Path(folder)), options)


def run(model: str, options: argparse.Namespace) -> None:
    """All rows of *model*."""
    try:
        with fresh_engine(model, options) as engine:
            count, page_tokens = engine.tokenizer, engine.plan.page_tokens
    except ConfigurationError as error:
        if options.reuse != "anywhere":
            raise
        raise SystemExit(f"this engine does not take reuse='anywhere': {error}") from error
    corpora = [
        draw_corpus(
            seed,
            lambda text: len(count(text, add_special_tokens=False)["input_ids"]),
            options.documents,
            options.passages,
            options.questions,
        )
        for seed in range(1, options.seeds + 1)
    ]
    results, rows = [], []
    for name, build, variants in ROWS:
        for variant in variants:
            wanted = not options.rows or any(text.lower() in name.lower() for text in options.rows)
            if not wanted or (options.variants and variant not in options.variants):
                continue
            if variant == "warmed" and options.reuse == "off":
                continue
            runs = [measure(model, build, variant, corpus, options) for corpus in corpora]
            figures = summarise(runs)
            results.append({"pipeline": name, "variant": variant, **figures, "runs": runs})
            shown = [name, NAMES.get(variant, variant), *(f"{100 * figures[key]:.0f} %" for key in ("reused", "ideal"))]
            shown.append("-" if figures["of_ideal"] is None else f"{figures['of_ideal']:.2f}")
            shown.append(f"{100 * figures['seen']:.0f} %")
            if options.reuse == "anywhere":
                shown += [f"{100 * figures['blended']:.0f} %", f"{100 * figures['spared']:.0f} %"]
                shown.append(f"{figures['spared'] / figures['seen']:.2f}")
            if options.seconds:
                shown.append("-" if figures["later_seconds"] is None else f"{figures['later_seconds']:.2f}")
            rows.append(shown)
            print(*shown, sep=" | ", flush=True)
    columns = ["pipeline", "passages", "reused", "ideal prefix", "reused / ideal", "seen anywhere"]
    columns += ["blended", "not computed", "not computed / seen"] * (options.reuse == "anywhere") + [
        "later: s"
    ] * options.seconds
    note = f"pages of {page_tokens} tokens, {options.questions} questions, {options.seeds} corpora"
    bench.show(f"Prompt tokens reused, {options.model}, reuse={options.reuse}", columns, rows, note)
    payload = {"model": options.model, "reuse": options.reuse, "page_tokens": page_tokens, "rows": results}
    bench.save("reuse" if options.reuse == "exact" else f"reuse_{options.reuse}", payload, options.json)


if __name__ == "__main__":
    main()

"""The headline: questions per hour about retrieved contexts, beside AirLLM and llama.cpp.

    python -m benchmarks.grow 3B MODEL
    python -m benchmarks.rag MODEL --environments FOLDER --work FOLDER [--cgroup 3GiB] [--memory 2300MiB]

The grown reader gives right answers at the size of a 3B model. Contexts have about 500 tokens, answers 6 to 10, all
greedy; 32 questions about 4 contexts, or about 32. Every runner gets the same token ids, in a process of its own in the
same memory cgroup, page cache included, with the model's files dropped from the page cache before. Counted is the time
from the first question to the last answer; loading the model is not, nor is what a peer writes beforehand (AirLLM's
split, llama.cpp's GGUF). A slow runner answers only the first few questions, and its rate is theirs; the table says how
many it was. "Store filled" means that the contexts were computed before, by another process (ours) or by this one
before the clock starts (llama.cpp); none of the questions was asked before.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from layerstream import KVStoreConfig, LayerStream, SamplingParams
from transformers import AutoTokenizer

from benchmarks import bench
from benchmarks.peers.environments import gguf_of, python_of, split_for_airllm
from benchmarks.reader.prompts import ASSISTANT, BOS, END, USER, draw_context
from benchmarks.reader.tokenizer import END_ID, PAD_ID

HERE = Path(__file__).resolve().parent
NUM_QUESTIONS = 32
MAX_TOKENS = 16
CONTEXT_TOKENS = range(460, 541)
ANSWER_TOKENS = range(6, 11)


def draw_workload(tokenizer: Any, num_contexts: int) -> dict[str, Any]:
    """Token ids of contexts and of prompts that begin with them, with the right answers."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    contexts: list[list[int]] = []
    questions: list[dict[str, Any]] = []
    seed = 0
    while len(contexts) < num_contexts:
        seed += 1
        rng = random.Random(f"held out, headline, {seed}")
        text, turns = draw_context(rng, rng.randint(18, 30), unanswerable=0.0, num_questions=60)
        head = encode(f"{BOS}{USER}Context:\n{text}")
        asked = [(encode(f"\n\nQuestion: {q}{END}{ASSISTANT}"), a) for q, a in turns]
        fitting = [(ids, a) for ids, a in asked if len(encode(a)) + 1 in ANSWER_TOKENS]
        per_context = NUM_QUESTIONS // num_contexts
        if len(head) not in CONTEXT_TOKENS or len(fitting) < per_context:
            continue
        for ids, answer in fitting[:per_context]:
            questions.append({"context": len(contexts), "prompt": head + ids, "answer": answer})
        contexts.append(head)
    random.Random(0).shuffle(questions)
    return {
        "contexts": contexts,
        "questions": questions,
        "end": END_ID,
        "pad": PAD_ID,
        "max_tokens": MAX_TOKENS,
    }


def child(options: argparse.Namespace) -> None:
    """Ours: ``fill`` the store with the contexts, or answer, one at a ``single`` time or as a ``batch``."""
    workload = json.loads(options.workload.read_text())
    store = KVStoreConfig(options.store, min_free_bytes=0, max_bytes="20GB", answers=options.child != "fill")
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    started = time.perf_counter()
    with LayerStream(options.model, memory=options.memory, kv_store=store, progress=False) as engine:
        engine._open_store()
        load_seconds = time.perf_counter() - started
        prompts = [question["prompt"] for question in workload["questions"]]
        if options.child == "fill":
            prompts, params = workload["contexts"], SamplingParams(max_tokens=1, temperature=0.0)
        started = time.perf_counter()
        if options.child == "single":
            completions = [engine.generate([prompt], params)[0] for prompt in prompts]
        else:
            completions = engine.generate(prompts, params)
        seconds = time.perf_counter() - started
        stats = engine.stats()
    figures = {
        "load_seconds": load_seconds,
        "seconds": seconds,
        "answers": [completion.token_ids for completion in completions],
        "sweeps": stats.sweeps,
        "tokens_per_sweep": stats.tokens_out / stats.sweeps,
        "cached_tokens": stats.kv.reused_tokens,
        "drafters": {name: [counted.accepted, counted.drafted] for name, counted in stats.drafters.items()},
        "peak_memory_bytes": stats.peak_memory_bytes,
    }
    print("\n" + json.dumps(figures), flush=True)


class Headline:
    """Runs the workloads, runner by runner."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options = options
        self._work = work
        self._tokenizer = AutoTokenizer.from_pretrained(options.model)
        self._workloads = {}
        self._workload_files = {}
        for num_contexts in (4, NUM_QUESTIONS):
            self._workloads[num_contexts] = draw_workload(self._tokenizer, num_contexts)
            path = self._workload_files[num_contexts] = work / f"workload-{num_contexts}.json"
            path.write_text(json.dumps(self._workloads[num_contexts]))
        self.results: list[dict[str, Any]] = []

    def ours(self, name: str, mode: str, num_contexts: int, *, is_filled: bool) -> None:
        store = self._work / "store"
        shutil.rmtree(store, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.rag", str(self._options.model)]
        command += ["--memory", self._options.memory, "--store", str(store)]
        command += ["--workload", str(self._workload_files[num_contexts])]
        if is_filled:
            bench.run_child([*command, "--child", "fill"], self._options.cgroup)
        self._run("LayerStream", name, [*command, "--child", mode], self._options.model, num_contexts)

    def llama_cpp(self, name: str, mode: str, count: int, *, is_filled: bool) -> None:
        python = python_of(self._options.environments, "llama")
        gguf, _ = gguf_of(python, self._options.model, self._work)
        command = [str(python), str(HERE / "peers" / "rag_llama_cpp.py"), str(gguf), str(self._workload_files[4])]
        self._run("llama.cpp", name, [*command, str(count), mode, "filled" if is_filled else "empty"], gguf.parent, 4)

    def airllm(self, name: str, count: int, batch: int, *more: str) -> None:
        python = python_of(self._options.environments, "airllm")
        split, _ = split_for_airllm(python, self._options.model, self._work)
        command = [str(python), str(HERE / "peers" / "rag_airllm.py"), str(self._options.model), str(split)]
        command += [str(self._workload_files[4]), str(count), str(batch), *more]
        try:
            self._run("AirLLM 4.0.0" + (", gc stubbed" if more else ""), name, command, split, 4)
        except RuntimeError as error:
            print(f"AirLLM, {name}: {str(error)[-300:]}", file=sys.stderr)

    def _run(self, runner: str, name: str, command: list[str], files: Path, num_contexts: int) -> None:
        print(f"{runner}, {name} …", file=sys.stderr, flush=True)
        bench.drop_file_cache(files)
        found = bench.run_child(command, self._options.cgroup)
        questions = self._workloads[num_contexts]["questions"]
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found["answers"]]
        right = sum(text == question["answer"] for text, question in zip(texts, questions, strict=False))
        self.results.append(
            {
                "runner": runner,
                "workload": name,
                "questions": len(texts),
                "right": right,
                "per_hour": 3600 * len(texts) / found["seconds"],
                **found,
            }
        )
        last = self.results[-1]
        print(f"  {last['per_hour']:.0f} an hour, {right} of {len(texts)} right", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--work", type=Path, help="where the peers' copies of the model go, or are")
    parser.add_argument("--cgroup", default="3GiB")
    parser.add_argument("--memory", default="2300MiB")
    parser.add_argument("--airllm", type=int, default=3, help="questions that AirLLM answers one at a time")
    parser.add_argument("--airllm-batch", type=int, default=8, help="questions that it answers at once")
    parser.add_argument("--llama", type=int, default=6, help="questions that llama.cpp answers one at a time")
    parser.add_argument("--only", nargs="*", default=["ours", "llama", "airllm"])
    parser.add_argument("--json", type=Path)
    for name in ("--child", "--workload", "--store"):
        parser.add_argument(name, type=str if name == "--child" else Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model.resolve()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(exist_ok=True)
        headline = Headline(options, work)
        if "ours" in options.only:
            headline.ours("(i) one at a time, store filled", "single", 4, is_filled=True)
            headline.ours("(ii) 32 at once, store empty", "batch", 4, is_filled=False)
            headline.ours("(iii) 32 at once, store filled", "batch", 4, is_filled=True)
            headline.ours("(iv) 32 at once, 32 contexts, store empty", "batch", NUM_QUESTIONS, is_filled=False)
        if "llama" in options.only:
            headline.llama_cpp("(i) one at a time, store filled", "single", options.llama, is_filled=True)
            headline.llama_cpp("(ii) 32 at once, store empty", "batch", NUM_QUESTIONS, is_filled=False)
            headline.llama_cpp("(iii) 32 at once, store filled", "batch", NUM_QUESTIONS, is_filled=True)
        if "airllm" in options.only:
            headline.airllm("one at a time", options.airllm, 1)
            headline.airllm("one at a time", options.airllm, 1, "nogc")
            headline.airllm(f"{options.airllm_batch} at once", options.airllm_batch, options.airllm_batch)
            headline.airllm(f"{options.airllm_batch} at once", options.airllm_batch, options.airllm_batch, "nogc")
    slowest = min(headline.results, key=lambda result: result["per_hour"])["per_hour"]
    rows = [
        [
            result["runner"],
            result["workload"],
            str(result["questions"]),
            f"{result['right']}/{result['questions']}",
            f"{result['seconds'] / result['questions']:.1f}",
            f"{result['per_hour']:.0f}",
            f"{result['per_hour'] / slowest:.1f} x",
            f"{result['sweeps'] / result['questions']:.2f}" if "sweeps" in result else "-",
            bench.gib(result["cgroup_peak"]),
        ]
        for result in headline.results
    ]
    columns = (
        "",
        "workload",
        "asked",
        "right",
        "s each",
        "an hour",
        "against the slowest",
        "sweeps each",
        "cgroup peak",
    )
    bench.show(f"Questions per hour: {options.model.name}, memory cgroup {options.cgroup}", columns, rows)
    print(bench.save("rag", {"results": headline.results}, options.json))


if __name__ == "__main__":
    main()

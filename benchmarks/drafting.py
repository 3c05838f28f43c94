"""How many tokens a sweep brings: the reader on held-out questions, one at a time, greedy.

    python -m benchmarks.drafting [--contexts 15] [--draft-model FOLDER] [--model demo] [--json FILE]

Counted are sweeps that carried a request, those that prefilled included, and generated tokens, the end included. The
engine is told that its link is slow, so that rows are free as they are for a model that streams (up to the plan's
limit); nothing else is changed, and every answer is compared with the one without guesses. Beside it, transformers'
own prompt lookup (``prompt_lookup_num_tokens=10``) on the same model and prompts: forward passes instead of sweeps.

Rows: guesses from the context alone, on questions that the context answers and on all; with ten other questions about
the same context asked before; the same questions in another process; with a draft model; long answers ("List
everything that the context says about X."), for which the reader of this tree has to be trained on such questions.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from layerstream import KVStoreConfig, LayerStream, SamplingParams
from layerstream.checkpoint.hub import locate
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bench import save, show
from benchmarks.reader.prompts import ASSISTANT, BOS, END, USER, draw_context

NUM_FACTS = 20
MAX_TOKENS = 160
Question = tuple[str, str]


@dataclass
class Count:
    """What a run of questions took."""

    questions: int = 0
    right: int = 0
    same: int = 0
    tokens: int = 0
    sweeps: int = 0
    drafters: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def tokens_per_sweep(self) -> float:
        return self.tokens / max(1, self.sweeps)


def draw_questions(
    num_contexts: int, *, listings: float, unanswerable: float, per_context: int
) -> list[list[Question]]:
    """Prompts with the answers that the facts give, context by context; no training run has drawn them."""
    groups = []
    for index in range(num_contexts):
        rng = random.Random(f"held out, drafting, {index}")
        context, turns = draw_context(rng, NUM_FACTS, unanswerable, per_context, listings)
        groups.append(
            [(f"{BOS}{USER}Context:\n{context}\n\nQuestion: {q}{END}{ASSISTANT}", answer) for q, answer in turns]
        )
    return groups


class Bench:
    """Asks the same questions in several ways."""

    def __init__(self, model: str, rows: int) -> None:
        self.model = model
        self._rows = rows
        self._tokenizer = AutoTokenizer.from_pretrained(locate(model))
        self._plain: dict[str, list[int]] = {}

    def ask(self, questions: Sequence[Question], store: Path | None = None, **options: Any) -> Count:
        """One engine, the questions one after the other."""
        count = Count()
        config = None if store is None else KVStoreConfig(store, min_free_bytes=0)
        with LayerStream(self.model, kv_store=config, progress=False, **options) as engine:
            engine._parts.scheduler.budget._read_seconds = lambda: 1e3
            engine._parts.scheduler.budget.max_draft_rows = self._rows
            for prompt, answer in questions:
                params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
                completion = engine.generate([self.encode(prompt)], params)[0]
                if engine._parts.store is not None:
                    engine._parts.store.flush()
                self._add(count, prompt, answer, completion.text, completion.token_ids, completion.metrics.sweeps)
            found = engine.stats().drafters
            count.drafters = {name: (counted.accepted, counted.drafted) for name, counted in found.items()}
        return count

    def look_up(self, questions: Sequence[Question]) -> Count:
        """transformers' prompt lookup."""
        count = Count()
        model = AutoModelForCausalLM.from_pretrained(locate(self.model)).eval()
        passes = Counter[str]()
        model.register_forward_hook(lambda *_: passes.update(["forward"]))
        for prompt, answer in questions:
            ids = torch.tensor([self.encode(prompt)])
            passes.clear()
            with torch.inference_mode():
                found = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, prompt_lookup_num_tokens=10)[
                    0, ids.shape[1] :
                ].tolist()
            text = self._tokenizer.decode(found, skip_special_tokens=True)
            self._add(count, prompt, answer, text, found, passes["forward"])
        return count

    def encode(self, prompt: str) -> list[int]:
        """Token ids of *prompt*, which has its special tokens already."""
        return self._tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def _add(self, count: Count, prompt: str, answer: str, text: str, tokens: list[int], sweeps: int) -> None:
        count.questions += 1
        count.right += text.strip() == answer
        count.tokens += len(tokens)
        count.sweeps += sweeps
        count.same += self._plain.setdefault(prompt, tokens) == tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", help="a sibling: python -m benchmarks.reader.train FOLDER --shape sibling")
    parser.add_argument("--contexts", type=int, default=15)
    parser.add_argument("--rows", type=int, default=127, help="guesses in a sweep at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options.model, options.rows)
    short = draw_questions(options.contexts, listings=0.0, unanswerable=0.15, per_context=20)
    first, later = [q for group in short for q in group[:10]], [q for group in short for q in group[10:]]
    answered = [
        question
        for group in draw_questions(options.contexts, listings=0.0, unanswerable=0.0, per_context=10)
        for question in group
    ]
    long = [
        question
        for group in draw_questions(options.contexts, listings=1.0, unanswerable=0.0, per_context=2)
        for question in group
        if len(bench.encode(question[1])) >= 60
    ]
    counts: dict[str, Count] = {}
    for name, questions in (("answered", answered), ("all", first), ("long", long)):
        counts[f"{name}: no guesses"] = bench.ask(questions, speculation="off")
        counts[f"{name}: prompt lookup (transformers)"] = bench.look_up(questions)
        counts[f"{name}: context"] = bench.ask(questions)
    counts["new questions: no guesses"] = bench.ask(later, speculation="off")
    counts["new questions: prompt lookup (transformers)"] = bench.look_up(later)
    with tempfile.TemporaryDirectory() as folder:
        bench.ask(first, Path(folder))
        counts["new questions: context and ten remembered answers"] = bench.ask(later, Path(folder))
        counts["all: asked before, in another process"] = bench.ask(first, Path(folder))
    if options.draft_model:
        counts["all: context and draft model"] = bench.ask(first, draft_model=options.draft_model, memory="1GiB")
        counts["long: context and draft model"] = bench.ask(long, draft_model=options.draft_model, memory="1GiB")
    rows = [
        [
            name,
            str(count.questions),
            f"{count.right / count.questions:.1%}",
            f"{count.same / count.questions:.1%}",
            f"{count.tokens / count.questions:.1f}",
            f"{count.sweeps / count.questions:.2f}",
            f"{count.tokens_per_sweep:.2f}",
            ", ".join(f"{drafter} {a}/{d}" for drafter, (a, d) in count.drafters.items()),
        ]
        for name, count in counts.items()
    ]
    columns = ("", "questions", "right", "same answer", "tokens each", "sweeps each", "tokens/sweep", "right/guessed")
    show(f"Tokens per sweep: {options.model}, {NUM_FACTS} facts a context", columns, rows)
    payload = {name: {**vars(count), "tokens_per_sweep": count.tokens_per_sweep} for name, count in counts.items()}
    print(save("drafting", {"options": vars(options) | {"json": None}, "rows": payload}, options.json))


if __name__ == "__main__":
    main()

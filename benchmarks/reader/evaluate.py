"""Measures a reader on facts that no training run has drawn.

    python -m benchmarks.reader.evaluate FOLDER [--samples 100] [--dtype fp32|bf16] [--json FILE]

An answer counts if every token of it, its end included, is the most likely one after the prompt and the tokens before
it: that is when greedy decoding writes exactly this answer. Each context is asked up to six questions in turn; the
first ones and the later ones are counted apart, since the later ones see the right earlier answers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.reader.facts import NOT_FOUND
from benchmarks.reader.prompts import END, FORMS, WRAPPERS, Sample, draw_sample
from benchmarks.reader.tokenizer import encode

FACT_COUNTS = (8, 20, 60)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Verdict:
    """One answer of the reader."""

    wrapper: str
    num_facts: int
    is_first: bool
    is_open: bool
    is_right: bool


@torch.inference_mode()
def judge(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[bool]:
    """Whether each answer of *sample* is what greedy decoding writes."""
    ids, _ = encode(sample, tokenizer)
    best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
    verdicts: list[bool] = []
    position = 0
    for text, is_answer in sample.pieces:
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if is_answer:
            verdicts.append(best[position - 1 : position + length - 1] == ids[position : position + length])
        position += length
    return verdicts


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_samples: int) -> list[Verdict]:
    """Verdicts on *num_samples* contexts for each wrapper and each number of facts."""
    verdicts: list[Verdict] = []
    for wrapper in (*WRAPPERS, *FORMS):
        for num_facts in FACT_COUNTS:
            for index in range(num_samples):
                rng = random.Random(f"held out, {wrapper}, {num_facts} facts, {index}")
                sample = draw_sample(rng, num_facts, wrapper)
                answers = [text.removesuffix(END).strip() for text, is_answer in sample.pieces if is_answer]
                for turn, (answer, is_right) in enumerate(zip(answers, judge(model, tokenizer, sample), strict=True)):
                    verdicts.append(Verdict(wrapper, num_facts, turn == 0, answer == NOT_FOUND, is_right))
    return verdicts


def share_right(verdicts: Iterable[Verdict]) -> float:
    """The share of right answers."""
    counts = Counter(verdict.is_right for verdict in verdicts)
    return counts[True] / max(1, counts.total())


def summarise(verdicts: list[Verdict]) -> dict[str, dict[str, float]]:
    """Shares of right answers, by what was asked and the number of facts."""
    asked = [v for v in verdicts if v.wrapper in WRAPPERS]
    rows: dict[str, list[Verdict]] = {"all": asked}
    rows["first question"] = [v for v in asked if v.is_first]
    rows["later questions"] = [v for v in asked if not v.is_first]
    rows["in the context"] = [v for v in asked if not v.is_open]
    rows["not in the context"] = [v for v in asked if v.is_open]
    rows |= {wrapper: [v for v in verdicts if v.wrapper == wrapper] for wrapper in (*WRAPPERS, *FORMS)}
    return {
        name: {f"{count} facts": share_right(v for v in chosen if v.num_facts == count) for count in FACT_COUNTS}
        | {"questions": len(chosen)}
        for name, chosen in rows.items()
    }


def format_table(summary: dict[str, dict[str, float]]) -> str:
    """The summary as a Markdown table."""
    columns = [f"{count} facts" for count in FACT_COUNTS]
    lines = [f"| | {' | '.join(columns)} | questions |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for name, row in summary.items():
        shares = " | ".join(f"{100 * row[column]:.1f} %" for column in columns)
        lines.append(f"| {name} | {shares} | {int(row['questions'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100, help="contexts per wrapper and number of facts")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, help="write the summary and every verdict here")
    options = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(options.folder, dtype=DTYPES[options.dtype]).eval()
    verdicts = evaluate(model, AutoTokenizer.from_pretrained(options.folder), options.samples)
    summary = summarise(verdicts)
    print(f"{options.dtype}, {options.samples} contexts per wrapper and number of facts\n\n{format_table(summary)}")
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "verdicts": [asdict(v) for v in verdicts]}, indent=1))


if __name__ == "__main__":
    main()

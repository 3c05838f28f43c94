"""What blending costs in answers: the bundled reader over retrieved documents, beside computing every prompt in full.

    python -m benchmarks.blending [--questions 200] [--documents 24]

Held-out documents of 100 to 250 tokens; a question about one of them is asked with it and three others in a random
order, so that most passages stand elsewhere than before. An answer is right if greedy decoding writes exactly it.
Counted beside it: how many answers are those of the full prefill, how far the first token's log-probability is off on
average, and which share of the prompts' tokens was cached, moved and computed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream import LayerStream, SamplingParams
from layerstream.text.prompt import QUESTION_PROMPT

from benchmarks import bench
from benchmarks.reader.facts import Sheet, draw_question, draw_sentences, draw_sheets, render_document

RETRIEVED = 4
SHARES: tuple[float, ...] = (0.05, 0.15, 0.3, 0.6)
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, logprobs=1)


@dataclass(frozen=True)
class Asked:
    """A question, the documents in its prompt, and the right answer."""

    prompt: str
    documents: tuple[str, ...]
    answer: str


def draw(num_questions: int, num_documents: int) -> list[Asked]:
    """Questions about held-out documents."""
    rng = random.Random("held out, blended")
    documents = draw_documents(rng, num_documents)
    asked = []
    for _ in range(num_questions):
        chosen = rng.sample(documents, RETRIEVED)
        question, answer = draw_question(rng, [chosen[0][0]], unanswerable=0.1)
        rng.shuffle(chosen)
        texts = tuple(text for _, text in chosen)
        asked.append(Asked(QUESTION_PROMPT.format(context="\n\n".join(texts), question=question), texts, answer))
    return asked


def draw_documents(rng: random.Random, count: int) -> list[tuple[Sheet, str]]:
    """*count* documents of 100 to 250 tokens."""
    documents: list[tuple[Sheet, str]] = []
    while len(documents) < count:
        for sheet in draw_sheets(rng, 24):
            text = render_document(sheet.entity, draw_sentences(sheet.facts, rng), rng)
            if len(sheet.facts) >= 5 and len(documents) < count:
                documents.append((sheet, text))
    return documents


def answer(asked: Sequence[Asked], **options: Any) -> dict[str, Any]:
    """What an engine with *options* answers."""
    answers, scores, counts = [], [], [0, 0, 0]
    with LayerStream("demo", kv_store=None, speculation="off", chunk_tokens=32, **options) as engine:
        engine.trust_reuse()
        for item in asked:
            found = engine.generate(item.prompt, PARAMS, passages=item.documents)[0]
            answers.append(found.text.strip())
            scores.append((found.logprobs or [])[0].logprob)
            usage = found.usage
            counts[0] += usage.prompt_tokens
            counts[1] += usage.cached_tokens
            counts[2] += usage.blended_tokens
    right = [found == item.answer for found, item in zip(answers, asked, strict=True)]
    prompt, cached, blended = counts
    shares = {"right": sum(right) / len(asked), "cached": cached / prompt, "blended": blended / prompt}
    return {"answers": answers, "scores": scores, **shares}


def main() -> None:
    """Ask both ways; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asked = draw(options.questions, options.documents)
    full = answer(asked)
    result: dict[str, Any] = {"questions": len(asked), "full": full}
    rows = [["full prefill", "", f"{full['right']:.1%}", "", "", f"{full['cached']:.0%}", ""]]
    for by in ("first", "deviation"):
        for share in SHARES:
            found = answer(asked, reuse="anywhere", recompute=share, recompute_by=by)
            result[f"{by} {share:.0%}"] = found
            same = sum(a == b for a, b in zip(found["answers"], full["answers"], strict=True)) / len(asked)
            off = sum(abs(a - b) for a, b in zip(found["scores"], full["scores"], strict=True)) / len(asked)
            shares = [f"{found[name]:.0%}" for name in ("cached", "blended")]
            rows.append([by, f"{share:.0%}", f"{found['right']:.1%}", f"{same:.1%}", f"{off:.3f}", *shares])
    columns = ["recomputed", "share", "right", "as in full", "first token off by", "cached", "blended"]
    bench.show(f"The bundled reader, {len(asked)} held-out questions", columns, rows)
    print("written to", bench.save("blending", result, options.json))


if __name__ == "__main__":
    main()

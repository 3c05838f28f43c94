"""What a multi-token-prediction head brings: tokens per sweep with it and without, the reader on held-out questions.

    python -m benchmarks.mtp FOLDER [--minutes 10] [--contexts 6] [--json FILE]

No published head is small enough to be shipped, so one is trained for the bundled reader, in the layout of Qwen3.5's
(``mtp.``): one more layer of the reader's kind, which learns to say the token after next while the reader stays as it
is. FOLDER gets the reader with that head; a second run finds it there. Questions, counting and the pretended slow link
are those of :mod:`benchmarks.drafting`. The head guesses in every round here, whatever that takes: the reader is so
small that its head is a fifth of it.

Rows: no guesses; guesses from the context; from the head alone; from both; from both in a process that finds the
contexts in a store, where the head knows what follows them alone.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from layerstream.checkpoint.hub import locate
from layerstream.model.mtp import Fusion
from layerstream.scheduling.drafting import pace
from layerstream.scheduling.drafting.suffix import SuffixDrafter
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.bench import save, show
from benchmarks.drafting import NUM_FACTS, Bench, Count, Question, draw_questions
from benchmarks.reader.tokenizer import PAD_ID
from benchmarks.reader.train import CONTEXT_LOSS, draw_batch

RATE = 2e-3
MOST_FACTS = 8  # in a context that it learns from
STEP_TOKENS = 2000
STEPS_AHEAD = 2  # it is trained on its own output as well: it guesses more than one token
NAMES = {
    "fusion.projection.": "mtp.fc.",
    "fusion.embedding_norm.": "mtp.pre_fc_norm_embedding.",
    "fusion.hidden_norm.": "mtp.pre_fc_norm_hidden.",
    "model.layers.0.": "mtp.layers.0.",
    "model.norm.": "mtp.norm.",
}


class Head(torch.nn.Module):
    """A head beside *reader*, of one layer like its own: it starts from the last of them."""

    def __init__(self, reader: LlamaForCausalLM) -> None:
        super().__init__()
        config = type(reader.config).from_dict({**reader.config.to_dict(), "num_hidden_layers": 1})
        self.model = LlamaForCausalLM(config).model
        del self.model.embed_tokens
        self.model.layers[0].load_state_dict(reader.model.layers[-1].state_dict())
        self.model.norm.load_state_dict(reader.model.norm.state_dict())
        self.fusion = Fusion(torch.nn.RMSNorm(config.hidden_size, 1e-6), config.hidden_size, torch.float32)
        self.fusion.projection = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        with torch.no_grad():
            self.fusion.projection.weight += torch.cat([torch.eye(config.hidden_size)] * 2, dim=1) / 2

    def forward(self, embedding: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``(samples, length, hidden)``."""
        return self.model(inputs_embeds=self.fusion(embedding, hidden), use_cache=False).last_hidden_state


def train(folder: Path, minutes: float, seed: int = 0) -> None:
    """Write the reader with a head that was trained for *minutes* to *folder*."""
    source = locate("demo")
    tokenizer = AutoTokenizer.from_pretrained(source)
    reader = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False).eval()
    torch.manual_seed(seed)
    head = Head(reader)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    started, step = time.monotonic(), 0
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        with mock.patch("benchmarks.reader.train.STEP_TOKENS", STEP_TOKENS):
            ids, marks, _ = draw_batch(random.Random(seed * 10**9 + step), tokenizer, MOST_FACTS, 0.06)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compute_loss(reader, head, ids, marks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - share)) * min(1.0, step / 20 + 0.05)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            print(f"{step:5d} {share:4.0%} loss {loss:.3f}", flush=True)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    found = load_file(folder / "model.safetensors")
    for name, tensor in head.state_dict().items():
        old = next(old for old in NAMES if name.startswith(old))
        found[NAMES[old] + name[len(old) :]] = tensor.detach().bfloat16().contiguous()
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def compute_loss(reader: LlamaForCausalLM, head: Head, ids: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Of the token after next, and of the one behind it from the head's own output."""
    with torch.no_grad():
        hidden = reader.model(input_ids=ids, use_cache=False).last_hidden_state
    embedding = reader.model.embed_tokens(ids)
    loss = torch.zeros(())
    for ahead in range(1, STEPS_AHEAD + 1):
        hidden = head(embedding[:, ahead:], hidden[:, :-1])
        logits = reader.lm_head(hidden[:, :-1]).float().flatten(0, 1)
        targets, is_answer = ids[:, ahead + 1 :].flatten(), marks[:, ahead + 1 :].flatten()
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = loss + losses[is_answer].mean() + CONTEXT_LOSS * losses[~is_answer & (targets != PAD_ID)].mean()
    return loss


def measure(bench: Bench, questions: list[Question]) -> dict[str, Count]:
    """Every way of guessing, on the same questions."""
    alone = mock.patch.object(SuffixDrafter, "begin", return_value=None)
    counts = {"no guesses": bench.ask(questions, speculation="off")}
    with mock.patch("layerstream.setup.assembly.make_mtp", return_value=None):
        counts["context"] = bench.ask(questions)
    with alone:
        counts["head"] = bench.ask(questions)
    counts["context and head"] = bench.ask(questions)
    with tempfile.TemporaryDirectory() as folder:
        bench.ask(questions, Path(folder), speculation="off")
        with alone:
            counts["head, contexts from a store"] = bench.ask(questions, Path(folder))
    return counts


def main() -> None:
    """Train, ask, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--rows", type=int, default=127, help="guesses in a sweep at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.folder / "model.safetensors").exists():
        train(options.folder, options.minutes)
    bench = Bench(str(options.folder), options.rows)
    drawn = {
        "short": draw_questions(options.contexts, listings=0.0, unanswerable=0.15, per_context=6),
        "long": draw_questions(options.contexts, listings=1.0, unanswerable=0.0, per_context=2),
    }
    rows, payload = [], dict[str, Any]()
    with mock.patch.object(pace, "FIRST_ROUNDS", 10**9):
        for kind, groups in drawn.items():
            for name, count in measure(bench, [question for group in groups for question in group]).items():
                rows.append(
                    [
                        f"{kind}: {name}",
                        str(count.questions),
                        f"{count.same / count.questions:.1%}",
                        f"{count.tokens / count.questions:.1f}",
                        f"{count.tokens_per_sweep:.2f}",
                        ", ".join(f"{drafter} {a}/{d}" for drafter, (a, d) in count.drafters.items()),
                    ]
                )
                payload[f"{kind}: {name}"] = {**vars(count), "tokens_per_sweep": count.tokens_per_sweep}
    columns = ("", "questions", "same answer", "tokens each", "tokens/sweep", "right/guessed")
    show(f"Tokens per sweep with a head: {options.folder.name}, {NUM_FACTS} facts a context", columns, rows)
    print(save("mtp", {"minutes": options.minutes, "contexts": options.contexts, "rows": payload}, options.json))


if __name__ == "__main__":
    main()

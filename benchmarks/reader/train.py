"""Trains the reader; resumable.

    python -m benchmarks.reader.train OUT [--tokens 24000000] [--minutes M] [--checkpoint FILE] [--warm FOLDER]

Contexts grow from 8 to 60 facts over the first 70 % of the run; Muon moves the matrices, AdamW the rest; the learning
rate is constant over the first half and falls linearly to zero over the second. A run ends after its tokens or its
minutes, whichever comes first. A warm run starts from another reader, whose tokenizer may differ, and with 16 facts.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.reader.prompts import draw_sample
from benchmarks.reader.tokenizer import BOS_ID, END_ID, PAD_ID, VOCAB_SIZE, encode, save_tokenizer

STEP_TOKENS = 6000
LEARNING_RATE = 2e-3
CONTEXT_LOSS = 0.3
MOST_FACTS = 60
FORMS_SHARE = 0.3  # of samples whose answers are JSON or calls of tools
QUESTIONS = (6, 24)  # a context costs its tokens once, and every question about it teaches
SAVE_SECONDS = 90


@dataclass(frozen=True)
class Shape:
    """Of a model: the reader's 1.9 M parameters by default."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 3


SHAPES = {"reader": Shape(), "sibling": Shape(96, 256, 3, 3, 3)}
"""The sibling, with 0.4 M parameters, drafts for the reader."""


@dataclass(frozen=True)
class Plan:
    """How long a run takes, and with how many facts its contexts start; a listing is as long as ten other answers."""

    tokens: int
    minutes: float = float("inf")
    first_facts: int = 8
    growth: float = 0.7
    seed: int = 0
    listings: float = 0.06
    rate: float = LEARNING_RATE
    shape: Shape = SHAPES["reader"]

    def most_facts(self, share: float) -> int:
        """The longest contexts when *share* of the run is over."""
        return round(self.first_facts + (MOST_FACTS - self.first_facts) * min(1.0, share / self.growth))


@dataclass
class Progress:
    """What has been done; part of the checkpoint."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    def share(self, plan: Plan) -> float:
        """Of the plan's tokens or minutes, whichever is nearer to its end."""
        return max(self.tokens / plan.tokens, self.seconds / (60 * plan.minutes))


def make_model(shape: Shape) -> LlamaForCausalLM:
    """Tied embeddings, heads of 32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        **asdict(shape),
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


class Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""

    def __init__(self, model: LlamaForCausalLM, rate: float) -> None:
        self._rate = rate
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self._all = (
            torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, share: float) -> None:
        """One step at *share* of the run."""
        rate = self._rate * min(1.0, 2 * (1 - share)) * min(1.0, share * 200 + 0.02)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self._all]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self._all, states, strict=True):
            optimizer.load_state_dict(state)


def draw_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, most_facts: int, listings: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and answer marks ``(samples, length)`` of about :data:`STEP_TOKENS` tokens, and how many are no padding."""
    num_facts = most_facts if rng.random() < 0.4 else rng.randint(4, most_facts)
    rows: list[tuple[list[int], list[bool]]] = []
    count = 0
    while count < STEP_TOKENS:
        sample = draw_sample(
            rng, num_facts, num_questions=rng.randint(*QUESTIONS), listings=listings, forms_share=FORMS_SHARE
        )
        rows.append(encode(sample, tokenizer))
        count += len(rows[-1][0])
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), PAD_ID)
    marks = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, (row_ids, row_marks) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        marks[row, : len(row_marks)] = torch.tensor(row_marks)
    return ids, marks, count


def compute_loss(model: LlamaForCausalLM, ids: torch.Tensor, marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss on the answers, and on everything else."""
    with torch.autocast("cpu", dtype=torch.bfloat16):  # 1.7 times as fast where the CPU multiplies in bf16
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    logits = logits.float().flatten(0, 1)
    targets, is_answer = ids[:, 1:].flatten(), marks[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    is_context = ~is_answer & (targets != PAD_ID)
    return losses[is_answer].mean(), losses[is_context].mean()


def train(out: Path, checkpoint: Path, plan: Plan, warm: Path | None = None) -> None:
    """Train as planned, from *checkpoint* if it exists, else from *warm* or from nothing; write the model to *out*."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(out)
    torch.manual_seed(plan.seed)
    model = make_model(plan.shape)
    if warm is not None:
        transplant(model, tokenizer, warm)
    optimizers = Optimizers(model, plan.rate)
    progress = Progress()
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizers)
    begun = Progress(**asdict(progress))
    saved = started = time.monotonic()
    model.train()
    while (share := progress.share(plan)) < 1:
        rng = random.Random(plan.seed * 10**9 + progress.steps)
        ids, marks, count = draw_batch(rng, tokenizer, plan.most_facts(share), plan.listings)
        answer_loss, context_loss = compute_loss(model, ids, marks)
        (answer_loss + CONTEXT_LOSS * context_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(share)
        now = time.monotonic()
        progress = Progress(progress.tokens + count, progress.steps + 1, begun.seconds + now - started)
        if progress.steps % 20 == 0:
            rate = (progress.tokens - begun.tokens) / (now - started)
            losses = f"answer {answer_loss:.3f} context {context_loss:.3f}"
            print(f"{progress.steps:5d} {progress.tokens / 1e6:6.2f}M {share:4.0%} {losses} {rate:5.0f}/s", flush=True)
        if now - saved > SAVE_SECONDS:
            save_checkpoint(checkpoint, model, optimizers, progress)
            saved = now
    save_checkpoint(checkpoint, model, optimizers, progress)
    write_model(model, tokenizer, out)


@torch.no_grad()
def transplant(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, warm: Path) -> None:
    """Take the weights of the reader in *warm*; a token that it lacks starts as the mean of its parts there."""
    source = LlamaForCausalLM.from_pretrained(warm, dtype=torch.float32)
    source_tokenizer = AutoTokenizer.from_pretrained(warm)
    rows = source.model.embed_tokens.weight.clone()
    model.load_state_dict(source.state_dict())
    known = source_tokenizer.get_vocab()
    embedding = model.model.embed_tokens.weight
    for token, index in tokenizer.get_vocab().items():
        if token in known:
            parts = [known[token]]
        else:
            parts = source_tokenizer(tokenizer.decode([index]), add_special_tokens=False)["input_ids"]
        embedding[index] = rows[parts].mean(0)


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Optimizers, progress: Progress) -> None:
    """Replace the checkpoint at once."""
    state = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "progress": asdict(progress)}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> Progress:
    """Fill model and optimizers; the progress so far."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    return Progress(**state["progress"])


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write bf16 weights, config and generation defaults (greedy)."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=24_000_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--checkpoint", type=Path, help="default: training.pt in OUT")
    parser.add_argument("--warm", type=Path, help="a reader to start from")
    parser.add_argument("--listings", type=float, default=0.06, help="share of questions that ask for everything")
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="learning rate of the first half")
    parser.add_argument("--shape", choices=SHAPES, default="reader")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warmed = {"first_facts": 16, "growth": 0.5} if options.warm else {}
    plan = Plan(
        options.tokens,
        options.minutes,
        seed=options.seed,
        listings=options.listings,
        rate=options.rate,
        shape=SHAPES[options.shape],
        **warmed,
    )
    train(options.out, options.checkpoint or options.out / "training.pt", plan, options.warm)


if __name__ == "__main__":
    main()

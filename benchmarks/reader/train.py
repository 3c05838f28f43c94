"""Trains the reader; resumable.

    python -m benchmarks.reader.train OUT [--tokens 14000000] [--checkpoint FILE]

Contexts grow from 8 to 60 facts over the first 70 % of the run; Muon moves the matrices, AdamW the rest; the learning
rate is constant over the first half and falls linearly to zero over the second.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.reader.prompts import BOS, END, PAD, Sample, draw_sample
from benchmarks.reader.tokenizer import VOCAB_SIZE, save_tokenizer

STEP_TOKENS = 6000
LEARNING_RATE = 2e-3
CONTEXT_LOSS = 0.3
FEWEST_FACTS, MOST_FACTS = 8, 60
IGNORED = -100


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """1.9 M parameters, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    return LlamaForCausalLM(config)


class Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self._all = (
            torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, share: float) -> None:
        """One step at *share* of the run."""
        rate = LEARNING_RATE * min(1.0, 2 * (1 - share)) * min(1.0, share * 200 + 0.02)
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


def encode(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are part of an answer."""
    ids: list[int] = []
    marks: list[bool] = []
    for text, is_answer in sample.pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        marks += [is_answer] * len(piece)
    return ids, marks


def draw_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, share: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and answer marks ``(samples, length)`` of about :data:`STEP_TOKENS` tokens, and how many are no padding."""
    most = FEWEST_FACTS + (MOST_FACTS - FEWEST_FACTS) * min(1.0, share / 0.7)
    num_facts = rng.randint(4, max(4, round(most)))
    if rng.random() < 0.4:
        num_facts = round(most)
    rows: list[tuple[list[int], list[bool]]] = []
    count = 0
    while count < STEP_TOKENS:
        rows.append(encode(draw_sample(rng, num_facts), tokenizer))
        count += len(rows[-1][0])
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    marks = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, (row_ids, row_marks) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        marks[row, : len(row_marks)] = torch.tensor(row_marks)
    return ids, marks, count


def compute_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, marks: torch.Tensor, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss on the answers, and on everything else."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    targets, is_answer = ids[:, 1:].flatten(), marks[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets.masked_fill(targets == pad, IGNORED), reduction="none", ignore_index=IGNORED)
    is_context = ~is_answer & (targets != pad)
    return losses[is_answer].mean(), losses[is_context].mean()


def train(out: Path, checkpoint: Path, total_tokens: int, seed: int = 0) -> None:
    """Train for *total_tokens* and write the model to *out*."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(out)
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    optimizers = Optimizers(model)
    done = step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        done, step = state["tokens"], state["step"]
    started, begun_at = time.time(), done
    model.train()
    while done < total_tokens:
        share = done / total_tokens
        ids, marks, count = draw_batch(random.Random(seed * 10**9 + step), tokenizer, share)
        answer_loss, context_loss = compute_loss(model, ids, marks, tokenizer.pad_token_id)
        (answer_loss + CONTEXT_LOSS * context_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(share)
        done += count
        step += 1
        if step % 20 == 0:
            rate = (done - begun_at) / (time.time() - started)
            print(f"{step:5d} {done / 1e6:6.2f}M answer {answer_loss:.3f} context {context_loss:.3f} {rate:5.0f}/s", flush=True)
        if step % 100 == 0:
            save_checkpoint(checkpoint, model, optimizers, done, step)
    save_checkpoint(checkpoint, model, optimizers, done, step)
    write_model(model, tokenizer, out)


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Optimizers, tokens: int, step: int) -> None:
    """Replace the checkpoint at once."""
    state = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "tokens": tokens, "step": step}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write bf16 weights, config and generation defaults (greedy)."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=14_000_000)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    train(options.out, options.checkpoint or options.out / "training.pt", options.tokens)


if __name__ == "__main__":
    main()

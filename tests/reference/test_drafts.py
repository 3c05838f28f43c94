"""Guesses change how many sweeps an answer takes, and not one bit of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.setup.assembly import assemble
from layerstream.setup.stepping import step_greedily

from tests.harness import add_tokenizer, config_for, draw_prompt
from tests.models import VOCAB_SIZE, make_model

NUM_TOKENS = 14
PROMPT_LENGTHS = (45, 3, 70)


class Guesser:
    """Trees of random tokens, with the right continuation somewhere in most of them."""

    def __init__(self, answers: Sequence[Sequence[int]], seed: int, num_nodes: int = 9) -> None:
        self._answers = answers
        self._rng = random.Random(seed)
        self._num_nodes = num_nodes
        self.num_guessed = 0

    def propose(
        self, sequences: Sequence[TokenSequence], num_decoded: int, num_prompt_tokens: int
    ) -> Mapping[TokenSequence, DraftTree]:
        trees = {}
        for sequence in sequences:
            room = min(sequence.tenancy.capacity, sequence.max_num_tokens - 1) - sequence.num_tokens
            if room > 0 and self._rng.random() < 0.8:
                trees[sequence] = self._draw(self._answers[sequence.sequence_id][sequence.num_output_tokens :], room)
                self.num_guessed += len(trees[sequence])
        return trees

    def _draw(self, right: Sequence[int], room: int) -> DraftTree:
        """Depth first; the path of right tokens is begun now and then, and left now and then."""
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        path, is_right = [ROOT], [True]
        while len(tokens) < self._num_nodes:
            depth = self._rng.randint(0, min(len(path) - 1, room - 1))
            path, is_right = path[: depth + 1], is_right[: depth + 1]
            guess = self._rng.randrange(3, VOCAB_SIZE)
            if is_right[-1] and depth < len(right) and self._rng.random() < 0.7:
                guess = right[depth]
            if any(p == path[-1] and t == guess for p, t in zip(parents, tokens, strict=True)):
                guess = self._rng.randrange(3, VOCAB_SIZE)
                if any(p == path[-1] and t == guess for p, t in zip(parents, tokens, strict=True)):
                    continue
            tokens.append(guess)
            parents.append(path[-1])
            depths.append(depth + 1)
            is_right.append(is_right[-1] and depth < len(right) and guess == right[depth])
            path.append(len(tokens) - 1)
        return DraftTree(tuple(tokens), tuple(parents), ("test",) * len(tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["resident", "layers"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral-window", "gemma2", "llama4-text", "qwen3-moe", "gpt-oss", "deepseek-v3"]
)
def test_bits_with_and_without(family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    _compare(family, mode, dtype, tmp_path, tokenizer_folder, num_trials=3)


@pytest.mark.parametrize(("family", "mode"), [("llama", "device-host"), ("deepseek-v3", "device-resident")])
def test_bits_on_a_device(family: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    _compare(family, mode, "float32", tmp_path, tokenizer_folder, num_trials=1)


def _compare(family: str, mode: str, dtype: str, folder: Path, tokenizer_folder: Path, num_trials: int) -> None:
    make_model(family, folder)
    add_tokenizer(folder, tokenizer_folder)
    config = replace(config_for(folder, mode), dtype=dtype)
    prompts = [draw_prompt(length) for length in PROMPT_LENGTHS]
    parts = assemble(config, None)
    try:
        tokens, logits = step_greedily(parts, prompts, NUM_TOKENS)
        before = parts.step.num_sweeps
        for seed in range(num_trials):
            guesser = Guesser(tokens, seed)
            found, found_logits = step_greedily(parts, prompts, NUM_TOKENS, guesser)
            assert guesser.num_guessed
            assert found == tokens
            assert all(torch.equal(a, b) for a, b in zip(found_logits, logits, strict=True))
        assert parts.step.num_sweeps - before < num_trials * before, "some of the guesses were right"
    finally:
        parts.close()

"""Trains the reader's byte-level BPE on generated samples."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.reader.prompts import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS, Sample, draw_sample

VOCAB_SIZE = 1024
PAD_ID, BOS_ID, END_ID = (SPECIAL_TOKENS.index(token) for token in (PAD, BOS, END))  # special tokens come first


def train_tokenizer(seed: int = 1, num_samples: int = 3000) -> PreTrainedTokenizerFast:
    """A tokenizer of :data:`VOCAB_SIZE` tokens whose template, not its encoder, adds the BOS."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # The space before a name or number is a token of its own: a value is then cut into the same tokens in the
            # context and at the start of an answer, and copying needs no second spelling.
            pre_tokenizers.Split(Regex(" (?=[A-Z0-9])"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (draw_sample(rng, rng.choice((8, 8, 16, 30))).text for _ in range(num_samples))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train and write to *folder*."""
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are part of an answer."""
    ids: list[int] = []
    marks: list[bool] = []
    for text, is_answer in sample.pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        marks += [is_answer] * len(piece)
    return ids, marks

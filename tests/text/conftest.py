"""Small tokenizers of the three kinds that models have."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.models import make_tokenizer

LINES = ["the quick brown fox jumps over the lazy dog", "Ein Satz mit Umlauten: äöü, und noch einer.", "x = y + 1"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'pirate' %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def add_in_front(tokenizer: Tokenizer, *tokens: str) -> None:
    """Make *tokenizer* open every text with *tokens*."""
    ids = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{' '.join(tokens)} $A", special_tokens=ids)


def make_byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: ``▁`` for spaces, byte tokens for characters outside the vocabulary, a BOS in front."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES * 20, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    add_in_front(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def make_metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces with ``▁`` for spaces; the decoder strips the first one. No BOS, no chat template."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's: every byte is a token; a chat template that begins with the BOS."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def byte_fallback() -> PreTrainedTokenizerFast:
    return make_byte_fallback_tokenizer()


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    return make_metaspace_tokenizer()


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback", "metaspace"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each of the three."""
    return request.getfixturevalue(request.param)

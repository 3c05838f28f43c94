"""Prompts to tokens and tokens to text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.errors import ConfigurationError, PromptError
from layerstream.params import SamplingParams
from layerstream.text.defaults import load_defaults
from layerstream.text.detokenizer import Detokenizer
from layerstream.text.prompt import PromptEncoder, split_prompts
from layerstream.text.stop import StopMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.models import make_tokenizer

BYTE_LEVEL = make_tokenizer()


def make_metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece-like: a word's space belongs to its token, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


METASPACE = make_metaspace()


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([BYTE_LEVEL, METASPACE]), st.text(max_size=40), st.text(max_size=20))
def test_pieces_add_up_to_the_text(tokenizer: Any, text: str, prompt: str) -> None:
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt_ids)
    shown = "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    assert before + shown == whole


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(5, len(BYTE_LEVEL) - 1), max_size=30))
def test_arbitrary_bytes_never_show_half_a_character(ids: list[int]) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    shown = "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()
    assert shown == BYTE_LEVEL.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_an_emoji_appears_whole() -> None:
    ids = BYTE_LEVEL("a😀b", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", "", "😀", "b"]


def test_special_tokens_are_not_shown() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert detokenizer.push(BYTE_LEVEL.eos_token_id) + detokenizer.finish() == ""


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), max_size=40),
)
def test_stop_strings_equal_a_search_of_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(tuple(stops))
    shown, at = "", 0
    for cut in [*cuts, len(text)]:
        shown += matcher.push(text[at : at + cut])
        at += cut
        assert text.startswith(shown)
    shown += matcher.finish()
    found = min(((text.find(stop), len(stop), stop) for stop in stops if stop in text), default=None)
    assert shown == (text if found is None else text[: found[0]])
    assert (matcher.matched is None) == (found is None)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(("\n\nQ:",))
    assert [matcher.push(piece) for piece in ("yes.\n", "\nQ", "uite")] == ["yes.", "", "\n\nQuite"]
    assert [matcher.push(piece) for piece in ("\n\n", "Q: more")] == ["", ""]
    assert matcher.matched == "\n\nQ:"


def encoder(tokenizer: Any = BYTE_LEVEL, max_context: int = 50) -> PromptEncoder:
    return PromptEncoder(tokenizer, max_context=max_context, vocab_size=len(tokenizer))


def test_text_from_the_chat_template_gets_no_second_bos() -> None:
    messages = [{"role": "user", "content": "fox"}]
    text = encoder().apply_chat_template(messages)
    ids = encoder().encode(messages)
    assert ids == encoder().encode(text)
    assert ids.count(BYTE_LEVEL.bos_token_id) == 1


def test_one_prompt_or_many() -> None:
    chat = [{"role": "user", "content": "x"}]
    assert split_prompts("x") == ["x"]
    assert split_prompts([1, 2]) == [[1, 2]]
    assert split_prompts(chat) == [chat]
    assert split_prompts(["x", [1], chat]) == ["x", [1], chat]
    assert split_prompts([]) == []
    with pytest.raises(PromptError, match="not float"):
        split_prompts(1.5)  # type: ignore[arg-type]


def test_a_model_without_chat_template_says_so() -> None:
    with pytest.raises(ConfigurationError, match="no chat template"):
        encoder(METASPACE).encode([{"role": "user", "content": "x"}])


def test_what_the_template_refuses_is_a_prompt_error() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        encoder(tokenizer).encode([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("said", "expected", "ends"),
    [
        (None, SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0), {2}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 6]},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=0, min_p=0.0, repetition_penalty=1.0),
            {2, 5, 6},
        ),
        (
            {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
            SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.1),
            {2, 9},
        ),
        (
            {"do_sample": True},
            SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0),
            {2, 9},
        ),
    ],
)
def test_generation_config_counts_only_for_what_it_says(
    tmp_path: Path, said: dict[str, Any] | None, expected: SamplingParams, ends: set[int]
) -> None:
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    config = SimpleNamespace(eos_token_id=9 if said is not None else None)
    defaults = load_defaults(tmp_path, config, BYTE_LEVEL)
    assert defaults.sampling == expected
    assert defaults.eos_token_ids == ends

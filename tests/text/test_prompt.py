"""What a prompt is, how it becomes tokens, and what is said of one that cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layerstream.errors import ConfigurationError, EmptyPrompt, PromptError, PromptTooLong
from layerstream.text.prompt import PromptEncoder, is_chat_messages, is_token_ids, split_prompts

from tests.text.conftest import TEMPLATE, add_in_front, make_byte_fallback_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox"}]


@pytest.fixture
def encoder(byte_fallback: Any) -> PromptEncoder:
    return PromptEncoder(byte_fallback, max_context=None)


def test_text_gets_the_special_tokens_of_the_tokenizer(encoder: PromptEncoder, byte_fallback: Any) -> None:
    ids = encoder.encode("the fox")
    assert ids == byte_fallback("the fox")["input_ids"]
    assert ids.count(byte_fallback.bos_token_id) == 1


def test_text_that_begins_with_the_bos_gets_no_second_one(encoder: PromptEncoder, byte_fallback: Any) -> None:
    ids = encoder.encode("<s>the fox")
    assert ids[0] == byte_fallback.bos_token_id
    assert ids.count(byte_fallback.bos_token_id) == 1


def test_messages_and_their_template_text_are_the_same_prompt(encoder: PromptEncoder, byte_fallback: Any) -> None:
    text = encoder.apply_chat_template(CHAT)
    assert text == "<s>[system]Be brief.[user]the fox[assistant]"
    assert encoder.encode(CHAT) == encoder.encode(text)
    assert encoder.encode(CHAT) == byte_fallback.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]


def test_generation_prompt_may_be_left_out(encoder: PromptEncoder) -> None:
    text = encoder.apply_chat_template(CHAT[1:], add_generation_prompt=False)
    assert text == "<s>[user]the fox"


def test_tools_and_options_reach_the_template() -> None:
    tokenizer = make_byte_fallback_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['function']['name'] }}|{{ mood }}|{{ messages[0]['content'] }}"
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    encoder = PromptEncoder(tokenizer, max_context=None)
    assert encoder.apply_chat_template(CHAT[1:], tools=[tool], mood="calm") == "search|calm|the fox"


def test_several_opening_tokens_are_not_doubled() -> None:
    tokenizer = make_byte_fallback_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    tokenizer.bos_token = None
    add_in_front(tokenizer.backend_tokenizer, "[gMASK]", "<sop>")
    encoder = PromptEncoder(tokenizer, max_context=None)
    opening = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert encoder.encode("dog")[:2] == opening
    written_out = encoder.encode("[gMASK]<sop>dog")
    assert written_out[:2] == opening
    assert not set(opening) & set(written_out[2:])


def test_a_tokenizer_without_bos_adds_nothing(metaspace: Any) -> None:
    encoder = PromptEncoder(metaspace, max_context=None)
    assert encoder.encode("the fox") == metaspace("the fox", add_special_tokens=False)["input_ids"]


def test_messages_without_a_chat_template_say_what_to_do(metaspace: Any) -> None:
    encoder = PromptEncoder(metaspace, max_context=None)
    assert not encoder.has_chat_template
    with pytest.raises(ConfigurationError, match=r"no chat template.*pass plain text, or use an instruct model"):
        encoder.encode(CHAT)


def test_a_refusal_of_the_template_is_passed_on(encoder: PromptEncoder) -> None:
    with pytest.raises(PromptError, match="unknown role pirate"):
        encoder.encode([{"role": "pirate", "content": "Arr"}])


@pytest.mark.parametrize("message", [{"content": "Hi"}, {"role": None, "content": "Hi"}])
def test_a_message_without_a_role_is_refused(encoder: PromptEncoder, message: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="'role'"):
        encoder.encode([message])


def test_no_messages_are_no_chat(encoder: PromptEncoder) -> None:
    with pytest.raises(PromptError, match="chat messages are a list"):
        encoder.apply_chat_template([])


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), range(5, 7), [np.int64(5), np.int32(6)]])
def test_token_ids_are_taken_as_they_are(encoder: PromptEncoder, ids: Any) -> None:
    encoded = encoder.encode(ids)
    assert encoded == [5, 6]
    assert all(type(item) is int for item in encoded)


def test_token_ids_outside_the_vocabulary(encoder: PromptEncoder, byte_fallback: Any) -> None:
    size = len(byte_fallback)
    assert encoder.encode([size - 1]) == [size - 1]
    for wrong in (size, -1):
        with pytest.raises(PromptError, match=rf"token id {wrong} is not in the vocabulary; expected 0 to {size - 1}"):
            encoder.encode([0, wrong])


def test_the_models_vocabulary_may_be_another_size(byte_fallback: Any) -> None:
    wide = PromptEncoder(byte_fallback, max_context=None, vocab_size=1000)
    assert wide.encode([999]) == [999]
    with pytest.raises(PromptError, match="expected 0 to 999"):
        wide.encode([1000])


def test_tokens_that_the_tokenizer_has_and_the_model_has_not() -> None:
    tokenizer = make_byte_fallback_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.chat_template = TEMPLATE.replace("[assistant]", "<extra>")
    encoder = PromptEncoder(tokenizer, max_context=None, vocab_size=size)
    assert encoder.encode("the fox")
    for prompt in ("a<extra>b", [3, size], CHAT):
        with pytest.raises(PromptError, match=rf"token id {size} \('<extra>', which the tokenizer has and the model"):
            encoder.encode(prompt)


@pytest.mark.parametrize("prompt", ["the \ud800 fox", [{"role": "user", "content": "the \ud800 fox"}]])
def test_half_a_character_is_refused(encoder: PromptEncoder, prompt: Any) -> None:
    with pytest.raises(PromptError, match="half a character"):
        encoder.encode(prompt)


@pytest.mark.parametrize("prompt", [[], ()])
def test_an_empty_list_is_an_empty_prompt(encoder: PromptEncoder, prompt: Any) -> None:
    with pytest.raises(EmptyPrompt):
        encoder.encode(prompt)


def test_empty_text_is_empty_only_without_a_bos(encoder: PromptEncoder, byte_level: Any, byte_fallback: Any) -> None:
    assert encoder.encode("") == [byte_fallback.bos_token_id]
    with pytest.raises(EmptyPrompt):
        PromptEncoder(byte_level, max_context=None).encode("")


def test_whitespace_is_not_empty(byte_level: Any) -> None:
    assert len(PromptEncoder(byte_level, max_context=None).encode(" \n")) == 2


def test_a_prompt_leaves_room_for_one_token(byte_level: Any) -> None:
    encoder = PromptEncoder(byte_level, max_context=4)
    assert encoder.encode([7, 8, 9]) == [7, 8, 9]
    with pytest.raises(PromptTooLong, match=r"has 4 tokens; the context has 4, .* retrieve fewer documents"):
        encoder.encode([7, 8, 9, 10])


@pytest.mark.parametrize(
    "prompt",
    [None, 7, b"bytes", bytearray(b"ab"), 1.5, [1, "a"], [True, False], [1.0], [[1], [2]], {"role": "user"}, object()],
)
def test_what_is_no_prompt_is_refused(encoder: PromptEncoder, prompt: Any) -> None:
    with pytest.raises(PromptError, match="a prompt is text, a list of token ids or a list of chat messages"):
        encoder.encode(prompt)


@pytest.mark.parametrize("ids", [np.array([5, 6]), torch.tensor([5, 6])])
def test_arrays_are_told_how_to_become_a_prompt(encoder: PromptEncoder, ids: Any) -> None:
    with pytest.raises(PromptError, match=r"call tolist\(\)"):
        encoder.encode(ids)
    with pytest.raises(PromptError, match=r"call tolist\(\)"):
        split_prompts(ids)


def test_a_single_message_is_told_to_be_a_list() -> None:
    with pytest.raises(PromptError, match="put the message into a list"):
        split_prompts({"role": "user", "content": "Hi"})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("prompt", ["text", "", [1, 2], CHAT, (1, 2)])
def test_one_prompt(prompt: Any) -> None:
    assert split_prompts(prompt) == [prompt]


@pytest.mark.parametrize("prompts", [["a", "b"], [[1], [2, 3]], [CHAT, CHAT], ["a", [1], CHAT], ["a"], [], [[]]])
def test_many_prompts(prompts: Any) -> None:
    assert split_prompts(prompts) == prompts


def test_discriminators() -> None:
    assert is_chat_messages(CHAT)
    assert not is_chat_messages([])
    assert not is_chat_messages([CHAT])
    assert not is_chat_messages("chat")
    assert is_token_ids([1, np.int64(2)])
    assert not is_token_ids([])
    assert not is_token_ids([torch.tensor([1])])
    assert not is_token_ids([True])

"""The texts of all pushes make up the full decode, whatever the ids and wherever characters are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.text.detokenizer import Detokenizer

TEXTS = [
    "the fox",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 and 🏳️‍🌈!",
    " two  spaces ",
    "\n\ttabs\r\n",
    "a\ufffdb\ufffd",
    "€" * 40,
]
FAST = settings(max_examples=150)
ids_below_320 = st.lists(st.integers(0, 319), max_size=60)


def decode(tokenizer: Any, ids: Sequence[int], *, skip: bool = True) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: Sequence[int], *, prompt: Sequence[int] = (), skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def byte_ids(tokenizer: Any, data: bytes) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "the dog", "jumps ", "日本"])
def test_answer_is_what_follows_the_prompt(any_tokenizer: Any, text: str, prompt: str) -> None:
    before = any_tokenizer(prompt)["input_ids"]
    answer = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = decode(any_tokenizer, [*before, *answer])
    assert "".join(pieces(any_tokenizer, answer, prompt=before)) == whole[len(decode(any_tokenizer, before)) :]


def test_leading_space_of_a_continuation_is_kept(byte_fallback: Any) -> None:
    prompt = byte_fallback("the lazy")["input_ids"]
    answer = byte_fallback("dog", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(byte_fallback, answer, prompt=prompt)) == " dog"
    assert "".join(pieces(byte_fallback, answer)) == "dog"


def test_leading_space_is_kept_after_special_tokens(byte_fallback: Any) -> None:
    prompt = [*byte_fallback("the lazy")["input_ids"], *[byte_fallback.eos_token_id] * 50]
    answer = byte_fallback("dog", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(byte_fallback, answer, prompt=prompt)) == " dog"


def test_no_half_character_is_shown(byte_level: Any) -> None:
    emoji = byte_level("🏳", add_special_tokens=False)["input_ids"]
    assert len(emoji) == 4
    assert pieces(byte_level, emoji) == ["", "", "", "🏳", ""]


def test_incomplete_character_at_the_end_is_one_replacement(byte_level: Any) -> None:
    emoji = byte_level("🏳", add_special_tokens=False)["input_ids"]
    assert pieces(byte_level, emoji[:3]) == ["", "", "", "\ufffd"]


def test_special_tokens_are_left_out_or_shown(byte_level: Any) -> None:
    ids = byte_level("a</s>b", add_special_tokens=False)["input_ids"]
    assert pieces(byte_level, ids) == ["a", "", "b", ""]
    assert pieces(byte_level, ids, skip=False) == ["a", "</s>", "b", ""]


def test_a_special_token_inside_a_character_does_not_break_it(byte_level: Any) -> None:
    first, second, third = byte_level("€", add_special_tokens=False)["input_ids"]
    assert pieces(byte_level, [first, second, byte_level.eos_token_id, third]) == ["", "", "", "€", ""]


def test_ids_outside_the_vocabulary_are_silent(any_tokenizer: Any) -> None:
    ids = any_tokenizer("the fox", add_special_tokens=False)["input_ids"]
    with_unknown = [9999, *(token for pair in ids for token in (pair, 9999))]
    assert "".join(pieces(any_tokenizer, with_unknown)) == decode(any_tokenizer, ids)


@FAST
@given(ids=ids_below_320, skip=st.booleans())
def test_byte_level_equals_full_decode_on_random_ids(byte_level: Any, ids: list[int], skip: bool) -> None:
    assert "".join(pieces(byte_level, ids, skip=skip)) == decode(byte_level, ids, skip=skip)


@FAST
@given(data=st.binary(max_size=120))
def test_byte_level_equals_full_decode_on_random_bytes(byte_level: Any, data: bytes) -> None:
    ids = [byte_level.convert_tokens_to_ids(_shown_as(byte)) for byte in data]
    assert decode(byte_level, ids) == data.decode("utf-8", "replace")
    assert "".join(pieces(byte_level, ids)) == data.decode("utf-8", "replace")


@FAST
@given(data=st.lists(st.sampled_from([0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 0xEF, 0xBD]), max_size=90))
def test_byte_level_equals_full_decode_on_broken_characters(byte_level: Any, data: list[int]) -> None:
    ids = [byte_level.convert_tokens_to_ids(_shown_as(byte)) for byte in data]
    assert "".join(pieces(byte_level, ids)) == bytes(data).decode("utf-8", "replace")


@FAST
@given(ids=ids_below_320, cut=st.integers(0, 60))
def test_byte_level_prompt_and_answer_from_any_cut(byte_level: Any, ids: list[int], cut: int) -> None:
    before = decode(byte_level, ids[:cut])
    if before.endswith("\ufffd"):
        before = before[:-1]  # a character that is cut by the prompt's end is the prompt's
        answer = decode(byte_level, ids)[len(before) + 1 :]
    else:
        answer = decode(byte_level, ids)[len(before) :]
    assert "".join(pieces(byte_level, ids[cut:], prompt=ids[:cut])) == answer


@FAST
@given(text=st.text(max_size=60), prompt=st.sampled_from(["", "the", "dog 日本", "x = "]))
def test_any_text_comes_out_as_decoded(any_tokenizer: Any, text: str, prompt: str) -> None:
    before = any_tokenizer(prompt)["input_ids"]
    answer = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = decode(any_tokenizer, [*before, *answer])
    assert "".join(pieces(any_tokenizer, answer, prompt=before)) == whole[len(decode(any_tokenizer, before)) :]


@FAST
@given(ids=st.lists(st.integers(0, 119), max_size=60), skip=st.booleans())
def test_metaspace_equals_full_decode_on_random_ids(metaspace: Any, ids: list[int], skip: bool) -> None:
    assert "".join(pieces(metaspace, ids, skip=skip)) == decode(metaspace, ids, skip=skip)


@FAST
@given(parts=st.lists(st.one_of(st.integers(259, 400), st.sampled_from(["€", "日", "😀", "\n", " "])), max_size=40))
def test_byte_fallback_equals_full_decode_on_pieces_and_whole_characters(
    byte_fallback: Any, parts: list[int | str]
) -> None:
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else byte_ids(byte_fallback, part.encode())
    assert "".join(pieces(byte_fallback, ids)) == decode(byte_fallback, ids)


def test_byte_fallback_characters_come_one_by_one(byte_fallback: Any) -> None:
    ids = byte_ids(byte_fallback, "€€😀".encode())
    assert pieces(byte_fallback, ids) == ["", "", "€", "", "", "€", "", "", "", "😀", ""]


def test_byte_fallback_keeps_what_was_shown_when_the_run_turns_invalid(byte_fallback: Any) -> None:
    fox = byte_fallback("the fox", add_special_tokens=False)["input_ids"]
    ids = [*byte_ids(byte_fallback, "€".encode() + b"\xff"), *fox]
    assert decode(byte_fallback, ids) == "\ufffd\ufffd\ufffd\ufffd the fox"  # the whole run is lost at once
    assert "".join(pieces(byte_fallback, ids)) == "€\ufffd the fox"


@pytest.mark.parametrize("start", [b"\xff", b"\xe2\x41", b"\xf0\x9f\x41"])
@pytest.mark.parametrize("count", [1, 5, 9, 30])
def test_byte_fallback_invalid_from_the_start_equals_full_decode(byte_fallback: Any, start: bytes, count: int) -> None:
    dog = byte_fallback("dog", add_special_tokens=False)["input_ids"]
    ids = [*byte_ids(byte_fallback, start + b"\x80\xe2\x82\xac" * count), *dog]
    assert "".join(pieces(byte_fallback, ids)) == decode(byte_fallback, ids)


def test_cost_of_a_token_does_not_grow(byte_level: Any) -> None:
    class Counting:
        """Passes on to the tokenizer and notes how many ids each decode got."""

        def __init__(self) -> None:
            self.sizes: list[int] = []

        def decode(self, ids: list[int], **options: Any) -> str:
            self.sizes.append(len(ids))
            return byte_level.decode(ids, **options)

    invalid = byte_level.convert_tokens_to_ids(_shown_as(0xFF))
    for ids in (byte_level("the quick 😀 fox " * 100)["input_ids"], [invalid] * 2000, [2] * 2000, [9999] * 2000):
        counting = Counting()
        pieces(counting, ids)
        assert max(counting.sizes) < 64
        assert len(counting.sizes) <= 2 * len(ids) + 4


def _shown_as(byte: int) -> str:
    """The character that stands for *byte* in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))
